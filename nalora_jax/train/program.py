"""The program of a run: model, mechanisms, optimizer and compiled step, built without weights."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import chex
import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.config import RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.method.measurement import CHECK_FAILED, GateChecks
from nalora_jax.method.step import Step, TrainState, init_state
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


@dataclass(frozen=True)
class RunProgram:
    """The parts of a run that compute nothing, so that devices may be abstract."""

    config: RunConfig
    model: Any  # Decoder or DualEncoder
    spec: AdapterSpec
    mesh: Mesh
    mechanisms: Mechanisms
    optimizer: optax.GradientTransformationExtraArgs
    blocks: dict[str, tuple[int, ...]]  # channel shape of each measured block
    pure: PureStep  # builds the step that is not compiled

    @property
    def eval_model(self) -> Any:
        """Returns the decoder for evaluation and generation.

        It has no rematerialization and no sharding constraints except for the expert routing.
        """
        stats = None
        if self.model.stats:
            stats = replace(self.model.stats, sharding=None)
        return self.model.clone(remat="none", stats=stats, activation_sharding=None)

    def fresh(self, lora: Any, key: jax.Array) -> TrainState:
        """Returns the state before the first step, for adapters and the data of a random key."""
        return init_state(lora, self.optimizer, 0)._replace(key=key)

    def places(self, lora: Any) -> Any:
        """Returns the shardings of the state; ``lora`` has the adapters or their shapes."""
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        state = jax.eval_shape(self.fresh, lora, key)
        return distributed.shardings(state, self.mesh, distributed.STATE_RULES)

    def compiled_step(self, places: Any) -> Step:
        """Returns the step, which is compiled on first use and donates the state."""
        step = self.pure(self.spec, self.mechanisms, {})
        return jit_step(self.config, step, self.mesh, places)


def gate_checks_of(config: RunConfig) -> GateChecks | None:
    """Returns the checks of ``--debug.check-gates``; None if they are off."""
    if not config.debug.check_gates:
        return None
    return GateChecks(config.debug.tolerance)


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
