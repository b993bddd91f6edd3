"""What a CPU prefers around compiled programs."""

from __future__ import annotations

import pytest

from nalora_jax.common import processor
from nalora_jax.cpu.native import library
from nalora_jax.models.remat import chosen_remat
from nalora_jax.ops.dispatch import numerics_for


@pytest.mark.parametrize(
    ("tiles", "d_model", "gated", "expected"),
    [
        (True, 768, True, "attention"),
        (True, 768, False, "dots"),  # one wide product to save, in place of two
        (True, 2048, True, "dots"),
        (False, 768, True, "dots"),
    ],
)
def test_products_are_computed_again_where_that_is_sooner(tiles, d_model, gated, expected, monkeypatch):
    monkeypatch.setattr(library, "kind", lambda devices=1: "tiles" if tiles else "vectors")
    assert chosen_remat("auto", d_model, numerics_for("bfloat16", "cpu"), gated=gated) == expected


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        (("tiles", "vectors"), "Xeon with AMX, "),
        (("vectors",), "Xeon with AVX512-BF16, "),
        ((), "Xeon, "),
    ],
)
def test_a_device_is_named_with_its_fastest_instructions(monkeypatch, kinds, named):
    monkeypatch.setattr(processor, "name", lambda: "Xeon")
    monkeypatch.setattr(processor, "kinds", lambda: kinds)
    assert processor.processor_name().startswith(named)
