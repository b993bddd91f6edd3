"""Layers of several kinds are divided into the fewest compiled blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nalora_jax.models.stacks import stacks
from tests.models.family_fields import tiny_config


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((0, 1, 1, 1), [("group0/block0", (0,)), ("group1/block0", (1, 2, 3))]),
        ((0, 0, 0, 1) * 3, [(f"group0/block{i}", (i, i + 4, i + 8)) for i in range(4)]),
        (
            (2, 0, 1, 0, 1),
            [("group0/block0", (0,)), ("group1/block0", (1, 3)), ("group1/block1", (2, 4))],
        ),
    ],
)
def test_layers_are_divided_into_the_fewest_compiled_blocks(kinds, expected):
    config = replace(tiny_config("llama"), n_layers=len(kinds), kinds=((),) * 3, layer_kinds=kinds)
    config = replace(config, windows=tuple(range(1, len(kinds) + 1)))
    assert [(s.prefix.removeprefix("layers/"), s.layers) for s in stacks(config)] == expected
    assert all(s.config.windows == tuple(i + 1 for i in s.layers) for s in stacks(config))
