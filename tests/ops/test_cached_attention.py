"""Attention over a long cache, read in blocks, against a float64 loop."""

from __future__ import annotations

import numpy as np
import pytest

from nalora_jax.ops import attention as module
from nalora_jax.ops.attention import AttentionConfig, CachedKeys, Keys, attention
from tests.ops.test_attention import FAR, PLAIN, SINKS, draw, layout, plain


@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(FAR, 0.0, None), (7, 1.5, SINKS), (FAR, 1.5, SINKS)]
)
def test_blocks_of_a_cache_equal_the_plain_loop(monkeypatch, window, softcap, sinks):
    """A cache of 24 slots in blocks of 10; the last 4 slots are empty and hold anything."""
    monkeypatch.setattr(module, "CACHE_BLOCK", 10)
    q, k, v = draw(90)
    positions, segments = layout(90)
    want = plain(q, k, v, positions, segments, window, 0.4, softcap, sinks)
    before = [
        np.concatenate([x[:, :20], np.full_like(x[:, :4], 7)], axis=1) for x in (k, v, positions, segments)
    ]
    before[3][:, 20:] = 0
    cached = CachedKeys(before[0].transpose(0, 2, 3, 1), before[1].transpose(0, 2, 1, 3), *before[2:])
    keys = Keys(*(x[:, 20:] for x in (k, v, positions, segments)))
    ours = np.asarray(
        attention(q[:, 20:], keys, window, AttentionConfig(0.4, softcap), PLAIN, cached=cached, sinks=sinks)
    )
    real = segments[:, 20:] > 0
    np.testing.assert_allclose(ours[real], want[:, 20:][real], atol=2e-6)
    assert np.isfinite(ours).all()  # padding too: its values are multiplied by 0 later
