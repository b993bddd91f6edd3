"""The program of a run: model, mechanisms, optimizer and step, built without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from nalora_jax import distributed
from nalora_jax.config import RunConfig
from nalora_jax.method.measurement import GateChecks
from nalora_jax.method.step import Step, TrainState, init_state
from nalora_jax.method.transform import Mechanisms
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.train.jitted import PureStep, jit_step


@dataclass(frozen=True)
class Program:
    """The parts of a run that compute nothing, so that devices may be abstract."""

    config: RunConfig
    model: Any  # Decoder or DualEncoder
    spec: AdapterSpec
    mesh: Mesh
    mechanisms: Mechanisms
    optimizer: optax.GradientTransformationExtraArgs
    blocks: dict[str, tuple[int, ...]]  # channel shape of each measured block
    pure: PureStep  # builds the step that is not compiled

    def fresh(self, lora: Any, key: jax.Array) -> TrainState:
        """Returns the state before the first step, for adapters and the data of a random key."""
        return init_state(lora, self.optimizer, 0)._replace(key=key)

    def places(self, lora: Any) -> Any:
        """Returns the shardings of the state; ``lora`` has the adapters or their shapes."""
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        state = jax.eval_shape(self.fresh, lora, key)
        return distributed.shardings(state, self.mesh, distributed.STATE_RULES)

    def step(self, places: Any) -> Step:
        """Returns the step, which is compiled on first use and donates the state."""
        step = self.pure(self.spec, self.mechanisms, {})
        return jit_step(self.config, step, self.mesh, places)


def gate_checks_of(config: RunConfig) -> GateChecks | None:
    """Returns the checks of ``--debug.check-gates``; None if they are off."""
    if not config.debug.check_gates:
        return None
    return GateChecks(config.debug.tolerance)
