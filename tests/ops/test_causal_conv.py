"""The causal convolution against torch, with packed segments, padding, and inputs of earlier
calls."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from nalora_jax.ops.causal_conv import causal_conv, causal_conv_after

WIDTH, CHANNELS = 4, 6
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(WIDTH, CHANNELS)).astype(np.float32)
X = RNG.normal(size=(2, 11, CHANNELS)).astype(np.float32)


def theirs(x):
    """torch's convolution of rows ``[batch, seq, channels]`` alone."""
    weight = torch.tensor(KERNEL.T[:, None])
    out = torch.nn.functional.conv1d(torch.tensor(x).mT, weight, padding=WIDTH - 1, groups=CHANNELS)
    return out[..., : x.shape[1]].mT.numpy()


def test_segments_and_padding_are_separate_rows():
    segments = np.array([[1, 1, 1, 1, 1, 1, 2, 3, 3, 3, 0], [0, 0, 1, 1, 2, 2, 2, 2, 2, 0, 0]])
    ours = np.asarray(causal_conv(X, KERNEL, segments))
    for row in range(2):
        for segment in set(segments[row]) - {0}:
            place = segments[row] == segment
            np.testing.assert_allclose(
                ours[row, place], theirs(X[row : row + 1, place])[0], rtol=1e-5, atol=1e-6
            )
    short = causal_conv(X[:, :2], KERNEL, np.ones((1, 2), np.int32))
    np.testing.assert_allclose(short, theirs(X[:, :2]), rtol=1e-5, atol=1e-6)


def test_later_calls_continue_and_skip_padding():
    real = np.array([[0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0]])
    before, pieces = jnp.zeros((2, WIDTH - 1, CHANNELS)), []
    for piece in (slice(0, 3), slice(3, 4), slice(4, 7), slice(7, 11)):
        out, before = jax.jit(causal_conv_after)(X[:, piece], KERNEL, real[:, piece], before)
        pieces.append(out)
    ours = np.concatenate(pieces, axis=1)
    for row in range(2):
        place = real[row] > 0
        np.testing.assert_allclose(
            ours[row, place], theirs(X[row : row + 1, place])[0], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_array_equal(before[row], X[row, place][-(WIDTH - 1) :])
