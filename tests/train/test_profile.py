"""Traces of some steps: their files, and the steps that are in them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from nalora_jax.config import DebugConfig, RunConfig, check
from nalora_jax.errors import NaloraError
from nalora_jax.train.profile import Profile

step_fn = jax.jit(lambda state: state + 1)


def run_steps(profile: Profile, first: int, last: int) -> None:
    with profile:
        state = jnp.zeros(3)
        for step in range(first, last + 1):
            with profile.step(step, state):
                state = step_fn(state)
            profile.end(step, state)


def traced_steps(file: Path) -> set[int]:
    """Returns the numbers of the steps in a trace, read by JAX."""
    planes = ProfileData.from_file(str(file)).planes
    events = (event for plane in planes for line in plane.lines for event in line.events)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Python 3.12 warns of the types of JAX's reader, which abort on an error
        return {int(dict(event.stats)["step_num"]) for event in events if event.name == "train"}


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    run_steps(Profile(range(3, 5), tmp_path), 1, 8)
    (file,) = tmp_path.rglob("*.pb")
    assert file.relative_to(tmp_path).as_posix() == "profile/plugins/profile/steps_3-4/process_0.xplane.pb"
    assert traced_steps(file) == {3, 4}


def test_a_run_that_resumes_and_stops_within_the_steps_is_traced_as_far_as_it_goes(tmp_path: Path) -> None:
    run_steps(Profile(range(3, 100), tmp_path), 6, 7)
    (file,) = tmp_path.rglob("*.pb")
    assert file.parent.name == "steps_6-7"
    assert traced_steps(file) == {6, 7}


@pytest.mark.parametrize("profile", ["5", "0:5", "5:0", "a:b", "5:5:5", "200:1", "-1:2"])
def test_other_forms_and_steps_are_refused(profile: str) -> None:
    with pytest.raises(NaloraError, match=r"--debug.profile: expected"):
        check(replace(RunConfig(), debug=DebugConfig(profile=profile)))
