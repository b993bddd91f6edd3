"""The share of a run's time that saving takes, from times that are known."""

from __future__ import annotations

import pytest


def test_what_a_save_adds_is_held_against_the_steps_between_two(script):
    stall = script("checkpoint_stall")
    # 10 steps of 2 s; a save adds 3, 4 and 14 s. Every 100 steps: 4 of 200 s.
    seconds = {"first": [23.0, 24.0, 34.0], "second": [20.0, 20.0, 20.0]}
    found = {"seconds": seconds, "calls": [0.5, 0.5, 0.5], "settings": {"steps": 10, "every": 100}}
    assert stall.share(found) == pytest.approx(0.02)
    (row,) = stall.rows({"cases": {"one": found}})
    assert row.verdict == "met"
    found["settings"]["every"] = 20
    assert stall.rows({"cases": {"one": found}})[0].verdict == "**missed**"
