"""Operations and their implementations for a platform (`nalora_jax.ops.dispatch`).

attention        softmax attention by segments, windows and caches   (cudnn_, triton_, splash_attention)
split_attention  attention of rows that devices share                (split_splash, split_triton)
grouped_matmul   rows sorted by group, each times its group's kernel  (triton_)
cross_entropy    loss of a frozen head without all logits in memory
residual_norm    x + y and its root-mean-square norm
matmul           matmuls with frozen kernels
storage          storage forms of frozen arrays and of saved activations
"""
