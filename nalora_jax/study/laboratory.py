"""What the runs of one process share: base models, tokens, items and compiled programs, each made on first use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nalora_jax import distributed
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.data.items import ChoiceItem, CompletionItem, Item
from nalora_jax.data.pipeline import BatchIterator, TrainData, train_data
from nalora_jax.data.questions import eval_examples
from nalora_jax.data.sources import check_disjoint, open_source
from nalora_jax.models.decoder import init_lora
from nalora_jax.study.plan import Run
from nalora_jax.study.protocol import Protocol, data_of
from nalora_jax.train.assembly import Assembly, assemble
from nalora_jax.train.initialise import gradient_adapters
from nalora_jax.train.state import TrainState
from nalora_jax.weights import LoadedModel, load_model

_RATE = "step_size"  # the factor of the optimizer's last stage, in its state: a traced value


@dataclass(frozen=True)
class Items:
    """Fixed items to measure on."""

    completions: Sequence[CompletionItem]  # the right answer of each
    choices: Sequence[ChoiceItem]  # those with choices
    digest: str  # of all token ids


@dataclass(frozen=True)
class Prepared:
    """A method made ready: its assembly at learning rate 1, and its weights as the step takes them."""

    assembly: Assembly
    params: Any


class Laboratory:
    """Keeps what is expensive between runs."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self._models: dict[str, LoadedModel] = {}
        self._prepared: dict[str, Prepared] = {}
        self._items: dict[str, Items] = {}
        self._base_losses: dict[str, float] = {}

    def model(self, config: RunConfig) -> LoadedModel:
        """The run's base model."""
        compute = config.compute
        key = json.dumps([config.model, compute.dtype, compute.quantize, config.to_dict()["mesh"]])
        if key not in self._models:
            kind = None if compute.quantize == "none" else compute.quantize
            mesh = distributed.smallest_mesh(config.mesh)
            self._models[key] = load_model(config.model, dtype=compute.dtype, mesh=mesh, quantized=kind)
        return self._models[key]

    def prepared(self, run: Run) -> Prepared:
        """The run's method, compiled once for all its learning rates and seeds.

        The step is built for a learning rate of 1 and its updates are multiplied by the run's own, a value in the
        optimizer's state: every optimizer of this library is linear in its learning rate, weight decay included.
        What a mechanism draws at random it draws when the step is built: such a method is compiled once a seed.
        """
        config = run.config
        draws = bool(config.mechanisms) or max(config.mask.permute, config.step_scale.permute) >= 0
        shape = {"max_length": config.data.max_length}
        optimizer = replace(config.optimizer, learning_rate=1.0)
        general = replace(config, seed=config.seed if draws else 0, data=DataConfig(), optimizer=optimizer)
        key = json.dumps([general.to_dict(), shape], sort_keys=True)
        if key not in self._prepared:
            model = self.model(config)
            last = optax.inject_hyperparams(optax.scale)(**{_RATE: 1.0})
            assembly = assemble(general, model.config, model.params, distributed.smallest_mesh(config.mesh), last=last)
            self._prepared[key] = Prepared(assembly, assembly.view(assembly.params))
        return self._prepared[key]

    def data(self, run: Run) -> TrainData:
        """The run's training rows, in its seed's order."""
        config = run.config
        tokenizer, train = self.model(config).tokenizer, config.train
        return train_data(
            config.data, tokenizer, batch_size=train.batch_size, accumulate=train.accumulate, seed=config.seed
        )

    def start(self, run: Run, data: TrainData) -> TrainState:
        """The state before the first step: the seed's A and the run's learning rate."""
        config, model, assembly = run.config, self.model(run.config), self.prepared(run).assembly
        seed = config.seed + self.protocol.methods[run.cell.method].reseed
        if assembly.initial is not None:  # PiSSA: the base decides, no seed does
            lora = assembly.initial
        elif config.lora.init == "gradient":
            batches = data.batches()
            rows = on_mesh(batches, assembly)
            lora = gradient_adapters(
                assembly, model.config, [next(rows) for _ in range(config.lora.gradient_batches)], seed
            )
            batches.close()
        else:
            params = assembly.params if assembly.spec.dora else None
            lora = init_lora(model.config, assembly.spec, jax.random.key(seed), params)
        state = assembly.begin(lora, config.seed)
        rate = jnp.asarray(config.optimizer.learning_rate, jnp.float32)
        placed = jax.device_put(rate, optax.tree.get(state.opt_state, _RATE).sharding)
        return state._replace(opt_state=optax.tree.set(state.opt_state, **{_RATE: placed}))

    def validation_items(self, run: Run) -> Items:
        """The items that choose the learning rate."""
        return self._drawn(run.config, run.config.data)

    def test_items(self, run: Run) -> Items:
        """The items that are read once, by the test runs.

        Raises:
          NaloraError: some of them are trained on or tuned on.
        """
        task, data = self.protocol.tasks[run.cell.task], run.config.data
        # Worded for the training split: what a tuned rate has seen must not be tested on either.
        check_disjoint(open_source(data, task.validation), open_source(data, task.test))
        return self._drawn(run.config, data_of(data.dataset, task.test, task.test_items, data))

    def probe_items(self, run: Run) -> dict[str, Items]:
        """Items of other data, by the name of the probe."""
        found = {}
        for name, probe in self.protocol.probes.items():
            data = replace(data_of(probe.dataset, probe.split, probe.items, run.config.data), train_split=probe.split)
            found[name] = self._drawn(run.config, data)
        return found

    def base_loss(self, run: Run, items: Items, measure: Any) -> float:
        """What ``measure`` says of the base model without an adapter, measured once."""
        key = json.dumps([run.config.model, run.config.to_dict()["compute"], items.digest])
        if key not in self._base_losses:
            self._base_losses[key] = measure()
        return self._base_losses[key]

    def _drawn(self, config: RunConfig, data: DataConfig) -> Items:
        key = json.dumps([config.model, vars(data)], default=str)
        if key not in self._items:
            self._items[key] = _items(eval_examples(data, self.model(config).tokenizer))
        return self._items[key]


def on_mesh(batches: BatchIterator, assembly: Assembly) -> Iterator[dict[str, jax.Array]]:
    """The batches as the step takes them."""
    for batch in batches:
        yield distributed.make_global_batch(batch, assembly.mesh, rows_axis=1)


@cache
def code_version() -> str:
    """sha256 of the package's source, to 12 digits: what was run, whether it was committed or not."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _items(items: Sequence[Item]) -> Items:
    completions, choices = [], []
    for item in items:
        if isinstance(item, ChoiceItem):
            choices.append(item)
            prompt, answer = item.contexts[item.gold], item.choice_ids[item.gold]
            completions.append(CompletionItem(list(prompt), list(answer), item.prompt, item.choices[item.gold]))
        else:
            completions.append(item)
    ids = json.dumps([[list(one.prompt_ids), list(one.completion_ids)] for one in completions])
    return Items(completions, choices, hashlib.sha256(ids.encode()).hexdigest()[:16])
