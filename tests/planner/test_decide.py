"""The search among ranked layouts, with a compiler that is a function of the layout."""

from __future__ import annotations

import logging
from collections.abc import Callable

import jax
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.planner.decide import MOST_COMPILED, Compiled, decide
from nalora_jax.planner.estimates import Layout

LIMIT = 16e9


def layout(memory: float, seconds: float, *, fsdp: int = 1, remat: str = "dots") -> Layout:
    return Layout(8 // fsdp, fsdp, 1, remat, "auto", weights=memory * 1e9, seconds=seconds, mfu=0.5)


def searched(
    candidates: list[Layout], compiler: Callable[[Layout], Compiled]
) -> tuple[Layout, list[Layout]]:
    taken, _, tried = decide(candidates, LIMIT, compiler)
    return taken, [one for one, _ in tried]


def compiled(memory: float, seconds: float) -> Compiled:
    return Compiled(memory * 1e9, memory * 1e9 <= LIMIT, seconds)


def test_a_layout_that_does_not_fit_leads_to_a_smaller_one_in_one_line_of_the_log(caplog):
    """The ratio of compiled to estimated memory applies to the others: 15 GB more of them would not
    fit either."""
    candidates = [layout(14, 1.0), layout(13.9, 1.1, fsdp=2), layout(10, 1.3, fsdp=8)]
    with caplog.at_level(logging.INFO, logger="nalora_jax.planner.decide"):
        found = searched(candidates, lambda one: compiled(1.2 * one.memory / 1e9, one.seconds))
    assert found == (candidates[2], [candidates[0], candidates[2]])
    assert caplog.messages == [
        "mesh: data 1 x fsdp 8 x tensor 1, remat dots (compiled: 12.0 GB, 1.3 s) instead of "
        "data 8 x fsdp 1 x tensor 1, remat dots (compiled: 16.8 GB, 1 s)"
    ]


def test_a_slow_program_is_compared_with_the_next_layouts_and_kept_if_they_are_slower():
    fast, slow = layout(12, 1.5), layout(9, 2.5)
    candidates = [layout(10, 1.0, fsdp=8), layout(8, 1.1, fsdp=8, remat="full")]
    factors = {8: 3.0, 1: 1.0}
    found = searched(
        [*candidates, fast, slow], lambda one: compiled(9, factors[one.fsdp] * one.seconds)
    )
    # Of the same mesh the other policy is taken to be as slow, so that it is not compiled.
    assert found == (fast, [candidates[0], fast])
    found = searched([*candidates, slow], lambda one: compiled(9, 1.4 * one.seconds))
    assert found == (candidates[0], candidates[:1])  # 2.5 s is more than 1.4


def test_an_internal_error_of_the_compiler_excludes_its_mesh(caplog):
    """libtpu has no route for some replica groups of v5e."""

    def without_routes(one: Layout) -> Compiled:
        if one.fsdp == 8:
            text = "INTERNAL: RET_CHECK failure (net_util.cc:2295)\nError encountered while compiling %a"
            raise jax.errors.JaxRuntimeError(text)
        return compiled(one.memory / 1e9, one.seconds)

    candidates = [layout(14, 1.0, fsdp=8), layout(12, 1.1, fsdp=8, remat="full"), layout(15, 1.3)]
    with caplog.at_level(logging.INFO, logger="nalora_jax.planner.decide"):
        found = searched(candidates, without_routes)
    assert found == (candidates[2], [candidates[0], candidates[2]])
    warning, line = caplog.messages
    assert warning.endswith("tensor 1, remat dots: INTERNAL: RET_CHECK failure (net_util.cc:2295)")
    assert line.endswith("instead of data 1 x fsdp 8 x tensor 1, remat dots (the compiler failed)")


def test_at_most_four_layouts_are_compiled_and_the_refusal_names_them():
    candidates = [layout(14 - index, 1 + index, fsdp=1 << index) for index in range(4)] * 2

    def too_large(one: Layout) -> Compiled:
        return compiled(17 + one.fsdp, 1.0)

    taken, result, tried = decide(candidates, LIMIT, too_large, must_fit=False)
    assert len(tried) == MOST_COMPILED
    assert not result.fits
    assert taken is candidates[0]
    message = r"fits in 16\.0 GB a chip, found .*18\.0 GB.*25\.0 GB.*; use more chips"
    with pytest.raises(NaloraError, match=message):
        decide(candidates, LIMIT, too_large)
