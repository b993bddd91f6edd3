"""Operations and their implementations for a platform (`nalora_jax.ops.dispatch`).

attention        softmax attention by segments, windows and caches   (attention_gpu, attention_tpu)
split_attention  attention of rows that devices share                (attention_gpu, attention_tpu)
grouped_matmul   rows sorted by group, each times its group's kernel
losses           loss of a head without all logits in memory
residual_norm    x + y and its root-mean-square norm
storage          storage forms of frozen arrays and of saved activations, matmuls with them
"""
