"""What is said beside a run's steps."""

from __future__ import annotations

import logging

import pytest

from nalora_jax.runs.hooks import say_counts


@pytest.mark.parametrize(
    ("choosing", "chosen", "warned"), [(4, True, True), (4, False, False), (10, True, False)]
)
def test_a_choice_by_few_examples_is_warned_of(
    caplog: pytest.LogCaptureFixture, choosing: int, chosen: bool, warned: bool
) -> None:
    with caplog.at_level(logging.INFO, "nalora_jax"):
        say_counts(8, choosing, chosen=chosen)
    said, *warnings = (record.getMessage() for record in caplog.records)
    by = f", the choice of the checkpoint on {choosing} others" if chosen else ""
    assert said == f"results rest on 8 held-out examples{by}"
    assert ["only 4 examples choose the checkpoint" in text for text in warnings] == [True] * warned
