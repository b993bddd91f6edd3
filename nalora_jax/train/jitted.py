"""Compilation of a step: its builder, one trace per run, and checks of the gates' values."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import Any, Protocol

import chex
import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax import distributed
from nalora_jax.config import RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.method.measurement import CHECK_FAILED
from nalora_jax.method.step import Step, TrainState
from nalora_jax.method.transform import Mechanisms
from nalora_jax.models.targets import AdapterSpec

_STEPS = itertools.count()


class PureStep(Protocol):
    """Builds the step of an assembly for other values of its settings."""

    def __call__(self, adapters: AdapterSpec, mechanisms: Mechanisms, numbers: Mapping[str, Any]) -> Step:
        """Returns a step that is not compiled.

        Args:
          adapters: of the assembly's projections, with other scales or larger ranks.
          mechanisms: with the assembly's memory and maybe other settings.
          numbers: of the optimizer, see `nalora_jax.train.optimizers.make_optimizer`.
        """


def jit_step(config: RunConfig, step: Step, mesh: Mesh, shardings: Any) -> Step:
    """Jits a pure step: one trace per run, state donated, chexified if gates are checked.

    ``placed`` is the sharding of the state.
    """
    step.__name__ = (
        f"train_step_{next(_STEPS)}"  # chex counts traces by name and call site; a process may run twice
    )
    step = chex.assert_max_traces(step, n=1)
    step.__name__ = "train_step"  # the name is part of the compilation cache's key
    compiled = jax.jit(
        step,
        donate_argnums=(1,),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        compiler_options=distributed.compiler_options(mesh),
    )
    if config.debug.check_gates:
        return _checked(compiled)
    return compiled


def _is_no_reminder(record: logging.LogRecord) -> bool:
    """Returns False for Chex's reminder at exit of unawaited checks; here all are awaited."""
    return "chexify assertion statuses were not inspected" not in str(record.msg)


def _checked(step: Step) -> Step:
    """Returns the step with value checks; a failed check raises this library's error."""
    armed = chex.chexify(step, async_check=False)
    logging.getLogger("absl").addFilter(_is_no_reminder)

    def run(params: Any, state: TrainState, batch: Any) -> Any:
        try:
            return armed(params, state, batch)
        except AssertionError as error:
            if CHECK_FAILED not in str(error):
                raise
            raise NaloraError(
                "--debug.check-gates",
                expected="the formulas of docs/method.md in every gate",
                found=str(error).split("[failed at")[0].strip(),
                remedy="report this with the model's name and the settings of the run",
            ) from error

    return run
