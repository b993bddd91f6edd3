"""Position embeddings of a square of patches, resized to an image's grid.

The interpolation is the same as in the family's training.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# The cubic kernel of Torch and OpenCV; `jax.image` uses -0.5, as in Keys' paper.
_CUBIC = -0.75


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Returns the matrix that resizes one axis: float32 ``[new, old]``.

    The interpolation is cubic without antialiasing, with borders repeated.
    """
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centres).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(centres - (first + tap))
        near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
        far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
        np.add.at(
            weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(distance <= 1, near, far)
        )
    return weights.astype(np.float32)


def resized(table: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes a square table of patch positions to another grid by cubic interpolation.

    Args:
      table: ``[side * side, d_model]``, row by row.
      height, width: patches of the images.

    Returns:
      ``[height * width, d_model]``; the table itself if the grid is the same.
    """
    side = round(table.shape[0] ** 0.5)
    if (height, width) == (side, side):
        return table
    square = table.astype(jnp.float32).reshape(side, side, -1)
    rows, columns = (jnp.asarray(cubic_weights(side, n)) for n in (height, width))
    square = jnp.einsum("hs,std->htd", rows, square, precision="highest")
    return jnp.einsum("wt,htd->hwd", columns, square, precision="highest").reshape(height * width, -1)


def resized_each(table: jax.Array, shapes: jax.Array, length: int) -> jax.Array:
    """Resizes a table of patch positions for a batch of images of different shapes.

    The interpolation is bilinear with antialiasing, as in the training of SigLIP 2.

    Args:
      table: ``[side * side, d_model]``.
      shapes: int ``[batch, 2]``, patches along height and width of every image.
      length: patches that every image is padded to.

    Returns:
      float32 ``[batch, length, d_model]``; padding has the first patch's position.
    """
    side = round(table.shape[0] ** 0.5)
    sizes = shapes.astype(jnp.float32)[:, None, :]
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32)[None, :], (shapes.shape[0], length))
    row = jnp.floor(place / sizes[..., 1])
    index = jnp.stack([row, place - row * sizes[..., 1]], axis=-1)
    real = (place < sizes[..., 0] * sizes[..., 1])[..., None]
    index = jnp.where(real, index, 0.0)
    scale = side / sizes  # [batch, 1, 2]
    centre = (index + 0.5) * scale - 0.5
    source = jnp.arange(side, dtype=jnp.float32)[None, None, None, :]
    reach = jnp.maximum(scale, 1.0)[..., None]
    weights = jnp.maximum(
        1.0 - jnp.abs(source - centre[..., None]) / reach, 0.0
    )  # [batch, length, 2, side]
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    square = table.astype(jnp.float32).reshape(side, side, -1)
    return jnp.einsum("bns,bnt,std->bnd", weights[:, :, 0], weights[:, :, 1], square, precision="highest")
