"""Base models, data, items and compiled programs that a process's runs share, created on demand."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nalora_jax.assembly.program import Assembly
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.method import rules, step
from nalora_jax.study import language, locations, planned_runs
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.subjects import subject_of
from nalora_jax.study.sweeps.fit import Fitting

log = logging.getLogger(__name__)

# The factor of the optimizer's last stage, a traced value in its state.
_RATE = "step_size"


class Resources(language.Subject):
    """Models, items and programs of a process.

    Args:
      protocol: the study.
      together: largest number of runs of a cell that train in one program; 0: as many as memory
        allows.
    """

    def __init__(self, protocol: Protocol, together: int = 1) -> None:
        super().__init__()
        self.protocol = protocol
        self._together = together

    def subject(self, config: RunConfig) -> Any:
        """Returns the kind of model that the run's task trains, as `Language`."""
        subject = subject_of(config)
        return self.once(subject, subject)

    def fitting(self, run: planned_runs.Run) -> Fitting | None:
        """Returns the mesh of a program of several runs, and how many runs fit in it.

        It is None if runs train one at a time, and the same for all runs of a model, so that each
        model is loaded once.
        """
        alone = self._together == 1 or self.protocol.several_meshes
        if alone or not subject_of(run.config).trains_together:
            return None
        return self.once(("fitting", run.cell.model), lambda: self._fitting(run.config))

    def _fitting(self, config: RunConfig) -> Fitting:
        """Returns the fitting of the largest stage of a cell, within the requested size."""
        protocol = self.protocol
        base = self.subject(config).architecture(config)
        tests = len(protocol.test_seeds) * len(protocol.test_multiples)
        most = max(len(protocol.rates) * len(protocol.tuning_seeds), tests)
        fits = Fitting.of(config, base, min(most, self._together or most))
        capacity = min(fits.capacity, self._together or fits.capacity)
        log.info("%s", fits.describe(capacity))
        layout = replace(fits.layout, runs_per_device=0)
        return replace(fits, layout=layout, capacity=capacity)

    def placed(self, run: planned_runs.Run) -> planned_runs.Run:
        """Returns the run on the mesh of programs of several runs, if there are any."""
        fits = self.fitting(run)
        if fits is None:
            return run
        return replace(run, mesh=fits.layout.into(run.config).mesh)

    def assembly(self, run: planned_runs.Run) -> Assembly:
        """Returns the run's method, compiled once for all its learning rates and seeds.

        The step is built for a learning rate of 1. Its updates are multiplied by the run's rate, a
        value in the optimizer's state: every optimizer here is linear in its rate, weight decay
        included. Mechanisms that draw at random do so when the step is built: one program per seed.
        """
        config = run.config
        subject = self.subject(run.config)
        program, facts = subject.program(config)
        optimizer = replace(config.optimizer, learning_rate=1.0)
        general = replace(program, seed=0, optimizer=optimizer)
        for text in config.mechanisms:
            rule = rules.make(text)
            if rule.draws or rule.permute >= 0:
                general = replace(general, seed=config.seed)
        last = optax.inject_hyperparams(optax.scale)(**{_RATE: 1.0})
        assembly: Assembly = self.once(
            (general, facts), lambda: subject.assemble(general, config, last)
        )
        return assembly

    def start(self, run: planned_runs.Run, data: Any) -> step.TrainState:
        """Returns the initial state, with the seed's A and the run's learning rate."""
        config = run.config
        assembly = self.assembly(run)
        seed = config.seed + self.protocol.methods[run.cell.method].reseed
        lora = self.subject(config).adapters(config, assembly, data, seed)
        state = assembly.begin(lora, config.seed)
        sharding = optax.tree.get(state.opt_state, _RATE).sharding
        rate = jnp.asarray(config.optimizer.learning_rate, jnp.float32)
        rate = jax.device_put(rate, sharding)
        opt_state = optax.tree.set(state.opt_state, **{_RATE: rate})
        return state._replace(opt_state=opt_state)

    def validation_items(self, run: planned_runs.Run) -> Any:
        """Returns the held-out items by whose loss the learning rate is chosen."""
        return self._draw(run.config, run.config.data)

    def test_items(self, run: planned_runs.Run) -> Any:
        """Returns the items that only test runs read.

        Raises:
          NaloraError: some of them are used for training or tuning.
        """
        task = self.protocol.tasks[run.cell.task]
        data = run.config.data
        test = locations.resolve_place(task.test, self.protocol.folder)
        # The error names the training split; test items must not overlap with validation items.
        self.subject(run.config).check_apart(run.config, data.eval_split, test)
        held_out = replace(data, eval_split=test, eval_limit=task.test_items)
        items = self._draw(run.config, held_out)
        if task.accuracy_items:
            # The protocol refuses it for images.
            assert isinstance(items, language.LanguageItems)
            items = items.scoring(task.accuracy_items)
        return items

    def probe_items(self, run: planned_runs.Run) -> dict[str, language.Items]:
        """Returns items of other data, by the name of the probe."""
        items = {}
        folder = self.protocol.folder
        for name, probe in self.protocol.probes.items():
            split = locations.resolve_place(probe.split, folder)
            data = replace(
                run.config.data,
                dataset=locations.locate_dataset(probe.dataset, folder),
                train_split=split,
                eval_split=split,
                eval_limit=probe.items,
            )
            items[name] = self._draw(run.config, data, "probe")
        return items

    def measure_base(
        self, run: planned_runs.Run, items: language.Items
    ) -> dict[str, float]:
        """Returns the measures of the base without an adapter on some items.

        They are computed once for each base, precision and set of items.
        """
        subject = self.subject(run.config)
        name, params = subject.base(run.config)
        key = "base", name, run.config.compute, items.digest
        return self.once(
            key, lambda: subject.measure(items, self.assembly(run), params)
        )

    def _draw(self, config: RunConfig, data: DataConfig, kind: str = "items") -> Any:
        """Returns held-out items, drawn once for all runs that would draw the same.

        ``kind`` is the method of the subject that draws them: "items" of a task, or "probe" for
        examples of data that the study does not train on.
        """
        draw = getattr(self.subject(config), kind)
        # The model's tokenizer and the settings of images decide what an item is.
        key = kind, config.model, config.compute, data, config.vision
        return self.once(key, lambda: draw(config, data))
