"""The number format MXFP4 (OCP Microscaling Formats 1.0): 4-bit floats with a power of two per 32 weights.

    weight = LEVELS[code] * 2 ** (scale - 127)      code: 4 bits, scale: uint8

4.25 bits per weight. The released gpt-oss files store experts in it. A kernel that was read from
such a file is stored again without loss: every level times a smaller power of two is a level as
long as the largest of the block remains one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 32
# Sign, two bits of exponent, one bit of mantissa.
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127
# Exponent of 4.0, the largest power of two among the levels.
_LARGEST = 2
# Midpoints of the levels above 0. A tie goes to the level with an even code: where this is the upper
# one, the threshold is the number below the midpoint.
_THRESHOLDS = tuple(
    np.nextafter(np.float32(middle), np.float32(0)) if up else np.float32(middle)
    for middle, up in ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0))
)


def exponents(largest: jax.Array) -> jax.Array:
    """Returns the scales uint8 of blocks whose largest magnitudes are given; 1 to 254, at least 2^-126."""
    _, exponent = jnp.frexp(largest)  # largest = m 2^exponent with 1/2 <= m < 1
    return jnp.clip(exponent - 1 - _LARGEST + _BIAS, 1, 254).astype(jnp.uint8)


def powers(scales: jax.Array) -> jax.Array:
    """Returns ``2 ** (scale - 127)`` in float32; 0 for a scale of 0, which float32 cannot hold normally."""
    return jax.lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)


def codes(unit: jax.Array) -> jax.Array:
    """Returns the code uint8 of the nearest level of every number; beyond 6 it is 6."""
    thresholds = jnp.asarray(_THRESHOLDS, jnp.float32)
    magnitude = jnp.searchsorted(thresholds, jnp.abs(unit), method="compare_all").astype(jnp.uint8)
    return magnitude | (jnp.signbit(unit).astype(jnp.uint8) << 3)
