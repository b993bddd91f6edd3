"""CPU implementations of operations; the package is optional.

Importing it registers the implementation "cpu" of all its operations. If it is deleted, every
operation uses its plain function.
"""

from __future__ import annotations

import nalora_jax.cpu.adapted_dense
import nalora_jax.cpu.attention
import nalora_jax.cpu.cross_entropy
import nalora_jax.cpu.gated_mlp
import nalora_jax.cpu.matmul
import nalora_jax.cpu.programs
import nalora_jax.cpu.residual_norm
import nalora_jax.cpu.rounding
import nalora_jax.cpu.storage
import nalora_jax.cpu.triangular  # noqa: F401
