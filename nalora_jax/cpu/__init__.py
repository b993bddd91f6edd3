"""CPU implementations of operations; the package is optional.

Importing it registers the implementation "cpu" of all its operations. If it is deleted, every
operation uses its plain function.
"""

from __future__ import annotations

import nalora_jax.cpu.attention
import nalora_jax.cpu.cross_entropy
import nalora_jax.cpu.matmul  # noqa: F401
