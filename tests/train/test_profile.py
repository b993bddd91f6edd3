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


def traced_steps(file: Path) -> set[int]:
    """Returns the numbers of the steps in a trace, read by JAX."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of the types of JAX's reader
        lines = [line for plane in ProfileData.from_file(str(file)).planes for line in plane.lines]
        events = [event for line in lines for event in line.events if event.name == "train"]
        return {int(dict(event.stats)["step_num"]) for event in events}


def test_a_trace_holds_the_steps_that_were_asked_for_as_far_as_the_run_goes(tmp_path: Path) -> None:
    state = jnp.zeros(3)
    add_one = jax.jit(lambda x: x + 1)
    for steps, first, last, traced in ((range(3, 5), 1, 8, {3, 4}), (range(3, 100), 6, 7, {6, 7})):
        folder = tmp_path / str(first)
        with Profile(steps, folder) as profile:
            for step in range(first, last + 1):
                with profile.step(step, state):
                    state = add_one(state)
                profile.end(step, state)
        (file,) = folder.rglob("*.pb")
        name = f"steps_{min(traced)}-{max(traced)}"
        assert (
            file.relative_to(folder).as_posix()
            == f"profile/plugins/profile/{name}/process_0.xplane.pb"
        )
        assert traced_steps(file) == traced


@pytest.mark.parametrize("profile", ["5", "0:5", "5:0", "a:b", "5:5:5", "200:1", "-1:2"])
def test_other_forms_and_steps_are_refused(profile: str) -> None:
    with pytest.raises(NaloraError, match=r"--debug.profile: expected"):
        check(replace(RunConfig(), debug=DebugConfig(profile=profile)))
