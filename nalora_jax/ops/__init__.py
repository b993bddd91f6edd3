"""Operations: each a plain JAX function, and the implementations that may stand in for it (`registry`).

adapted_dense   y = x W + b + s (x A) B, with the gated gradient of A
gated_mlp       y = (phi(x W_gate) * x W_up) W_down, with the statistics of the gate
attention       softmax attention by segments, windows and caches      (cudnn_, triton_, splash_attention)
grouped_matmul  rows sorted by group, each through its own group's kernel  (triton_)
cross_entropy   loss of a frozen head, never all logits
residual_norm   x + y and its root-mean-square norm
"""

# Registered as soon as any operation is imported.
import nalora_jax.ops.cudnn_attention
import nalora_jax.ops.splash_attention
import nalora_jax.ops.tpu_grouped_matmul
import nalora_jax.ops.triton_attention
import nalora_jax.ops.triton_grouped_matmul  # noqa: F401
