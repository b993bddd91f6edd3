"""Base models, data, items and compiled programs that a process's runs share, created on demand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.method.rules import make
from nalora_jax.method.step import TrainState
from nalora_jax.study.language import Language, LanguageItems
from nalora_jax.study.locations import locate_dataset, located_from
from nalora_jax.study.plan import Run
from nalora_jax.study.preferences import Preferences
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.rewards import Rewards
from nalora_jax.study.subject import Items, Subject
from nalora_jax.study.sweeps.fit import Fitting
from nalora_jax.train.program import Assembly

log = logging.getLogger(__name__)

_RATE = "step_size"  # the factor of the optimizer's last stage, a traced value in its state


class Resources:
    """Models, items and programs of a process.

    Args:
      protocol: the study.
      together: largest number of runs of a cell that train in one program; 0: as many as memory allows.
    """

    def __init__(self, protocol: Protocol, together: int = 1) -> None:
        self.protocol, self._together = protocol, together
        self._fitting: dict[str, Fitting] = {}
        self._subjects: dict[Callable[[], Subject], Subject] = {}
        self._assemblies: dict[Any, Assembly] = {}
        self._items: dict[Any, Items] = {}
        self._base: dict[Any, dict[str, float]] = {}

    def subject(self, config: RunConfig) -> Subject:
        """Returns the kind of model that the run's task trains."""
        kind: Callable[[], Subject] = Language
        if config.vision.task:
            kind = _dual_encoders
        elif config.preference.loss != "none":
            kind = Preferences
        elif config.rl.rewards:
            kind = Rewards
        if kind not in self._subjects:
            self._subjects[kind] = kind()
        return self._subjects[kind]

    def fitting(self, run: Run) -> Fitting | None:
        """Returns the mesh of programs of several runs, and how many fit; None if runs train one at a time.

        It is the same for all runs of a model, so that each model is loaded once.
        """
        if self._together == 1 or self.protocol.several_meshes or run.config.rl.rewards:
            return None
        if run.cell.model not in self._fitting:
            protocol, base = self.protocol, self.subject(run.config).architecture(run.config)
            tests = len(protocol.test_seeds) * len(protocol.test_multiples)
            most = max(len(protocol.rates) * len(protocol.tuning_seeds), tests)
            fits = Fitting.of(run.config, base, min(most, self._together or most))
            layout = replace(fits.layout, runs_per_device=0)
            capacity = min(fits.capacity, self._together or fits.capacity)
            self._fitting[run.cell.model] = replace(fits, layout=layout, capacity=capacity)
            log.info("%s", fits.describe(capacity))
        return self._fitting[run.cell.model]

    def capacity(self, run: Run) -> int:
        """Returns the number of runs of this model that train at the same time."""
        fits = self.fitting(run)
        return 1 if fits is None else fits.capacity

    def placed(self, run: Run) -> Run:
        """Returns the run on the mesh of programs of several runs, if there are any."""
        fits = self.fitting(run)
        return run if fits is None else replace(run, mesh=fits.layout.into(run.config).mesh)

    def assembly(self, run: Run) -> Assembly:
        """Returns the run's method, compiled once for all its learning rates and seeds.

        The step is built for a learning rate of 1. Its updates are multiplied by the run's rate, a
        value in the optimizer's state: every optimizer here is linear in its rate, weight decay
        included. Mechanisms that draw at random do so when the step is built: one program per seed.
        """
        config, subject = run.config, self.subject(run.config)
        draws = any(rule.draws or rule.permute >= 0 for rule in map(make, config.mechanisms))
        optimizer = replace(config.optimizer, learning_rate=1.0)
        program, facts = subject.program(config)
        general = replace(program, seed=config.seed if draws else 0, optimizer=optimizer)
        if (general, facts) not in self._assemblies:
            last = optax.inject_hyperparams(optax.scale)(**{_RATE: 1.0})
            self._assemblies[general, facts] = subject.assemble(general, config, last)
        return self._assemblies[general, facts]

    def start(self, run: Run, data: Any) -> TrainState:
        """Returns the initial state, with the seed's A and the run's learning rate."""
        config, assembly = run.config, self.assembly(run)
        seed = config.seed + self.protocol.methods[run.cell.method].reseed
        state = assembly.begin(self.subject(config).adapters(config, assembly, data, seed), config.seed)
        rate = jnp.asarray(config.optimizer.learning_rate, jnp.float32)
        rate_array = jax.device_put(rate, optax.tree.get(state.opt_state, _RATE).sharding)
        return state._replace(opt_state=optax.tree.set(state.opt_state, **{_RATE: rate_array}))

    def validation_items(self, run: Run) -> Items:
        """Returns the items that choose the learning rate."""
        return self._drawn(run.config, run.config.data, self.subject(run.config).items)

    def test_items(self, run: Run) -> Items:
        """Returns the items that only test runs read.

        Raises:
          NaloraError: some of them are used for training or tuning.
        """
        task, data = self.protocol.tasks[run.cell.task], run.config.data
        test = located_from(task.test, self.protocol.folder)
        # The error names the training split; test items must not overlap with validation items.
        self.subject(run.config).check_apart(run.config, data.eval_split, test)
        data = replace(data, eval_split=test, eval_limit=task.test_items)
        items = self._drawn(run.config, data, self.subject(run.config).items)
        if task.accuracy_items:
            assert isinstance(items, LanguageItems), "the protocol refuses it for images"
            items = items.scoring(task.accuracy_items)
        return items

    def probe_items(self, run: Run) -> dict[str, Items]:
        """Returns items of other data, by the name of the probe."""
        items, folder = {}, self.protocol.folder
        for name, probe in self.protocol.probes.items():
            dataset, split = locate_dataset(probe.dataset, folder), located_from(probe.split, folder)
            data = replace(
                run.config.data,
                dataset=dataset,
                train_split=split,
                eval_split=split,
                eval_limit=probe.items,
            )
            items[name] = self._drawn(run.config, data, self.subject(run.config).probe)
        return items

    def measure_base(self, run: Run, items: Items) -> dict[str, float]:
        """Returns the measures of the base without an adapter, computed once."""
        subject = self.subject(run.config)
        name, params = subject.base(run.config)
        key = name, run.config.compute, items.digest
        if key not in self._base:
            self._base[key] = subject.measure(items, self.assembly(run), params)
        return self._base[key]

    def _drawn(
        self, config: RunConfig, data: DataConfig, draw: Callable[[RunConfig, DataConfig], Items]
    ) -> Items:
        key = draw.__name__, config.model, config.compute, data, config.vision
        if key not in self._items:
            self._items[key] = draw(config, data)
        return self._items[key]


def _dual_encoders() -> Subject:
    from nalora_jax.study.images import DualEncoders  # Pillow is an optional dependency

    return DualEncoders()
