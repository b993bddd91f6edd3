"""A trace of some steps of a run for xprof (``--debug.profile START:STEPS``)."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from etils import epath

from nalora_jax.errors import NaloraError

log = logging.getLogger(__name__)
FOLDER = "profile"  # within a run's folder; the argument of ``xprof --logdir`` and TensorBoard


class Profile(AbstractContextManager["Profile"]):
    """Trace of consecutive steps on this process's host and devices.

    It is a context manager around all steps of the run.

    Every process writes one file, ``plugins/profile/steps_10-14/process_0.xplane.pb``; xprof shows
    them as the hosts of one run. If a run starts or stops within the steps, its part of them is
    traced.

    Args:
      steps: numbers of the steps; empty without a profile.
      folder: a `Path` or an ``epath.Path`` that this process may write to.
    """

    def __init__(self, steps: range = range(0), folder: Any = "") -> None:
        self._steps = steps
        self._folder = folder
        self._tracing = ExitStack()
        self._first = self._last = 0  # traced steps; 0 before and after

    @contextmanager
    def step(self, step: int, state: Any) -> Iterator[None]:
        """Annotates a step's dispatch; the first step waits for ``state`` and starts the trace."""
        if step in self._steps and not self._first:
            jax.block_until_ready(state)
            self._start(step)
        self._last = step
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def end(self, step: int, result: Any) -> None:
        """Ends the trace after its last step, once ``result`` is computed."""
        if self._first and step == self._steps[-1]:
            jax.block_until_ready(result)
            self._stop(step)

    def _start(self, step: int) -> None:
        """Starts a trace into a temporary folder.

        Raises:
          NaloraError: another trace of this process is running.
        """
        scratch = self._tracing.enter_context(tempfile.TemporaryDirectory())
        options = jax.profiler.ProfileOptions()
        # The Python tracer slows down the steps that it times.
        options.python_tracer_level = 0
        try:
            jax.profiler.start_trace(scratch, profiler_options=options)
        except RuntimeError as error:
            self._tracing.close()
            remedy = (
                "stop the other trace of this process, or leave --debug.profile out"
            )
            raise NaloraError(
                "--debug.profile",
                expected="a profiler that is free",
                found=error,
                remedy=remedy,
            ) from error
        self._first, self._scratch = step, Path(scratch)

    def _stop(self, step: int) -> None:
        """Ends the trace after ``step``, and copies this process's file to the run's folder.

        The layout, ``plugins/profile/<name>``, is the one that xprof and TensorBoard read.
        """
        first = self._first
        self._first = 0
        with self._tracing:
            jax.profiler.stop_trace()
            target = (
                epath.Path(self._folder)
                / FOLDER
                / "plugins"
                / "profile"
                / f"steps_{first}-{step}"
            )
            target.mkdir(parents=True, exist_ok=True)
            for file in self._scratch.rglob("*.xplane.pb"):
                name = f"process_{jax.process_index()}.xplane.pb"
                with file.open("rb") as source, (target / name).open("wb") as sink:
                    shutil.copyfileobj(source, sink)
        log.info(
            "profile of steps %d to %d: xprof --logdir %s",
            first,
            step,
            epath.Path(self._folder) / FOLDER,
        )

    def __exit__(self, *error: object) -> None:
        """Writes the trace if the run ended within the traced steps."""
        if self._first:
            self._stop(self._last)
