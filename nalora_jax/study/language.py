"""Language models in a study: answers to train on, and items with or without choices to measure on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax

from nalora_jax import distributed
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.data.items import ChoiceItem, CompletionItem, Item
from nalora_jax.data.packing import permutation
from nalora_jax.data.pipeline import TrainData, train_data
from nalora_jax.data.questions import eval_examples
from nalora_jax.data.sources import check_disjoint, open_source
from nalora_jax.evaluate.multiple_choice import multiple_choice
from nalora_jax.evaluate.perplexity import completion_loss
from nalora_jax.models.adapters import init_lora
from nalora_jax.tokenizer import AddedTokens
from nalora_jax.train.assembly import Assembly, assemble, starting_at
from nalora_jax.train.start import first_adapters
from nalora_jax.weights import LoadedModel, load_model
from nalora_jax.weights.new_tokens import with_added

_SEED = 20260104  # of the draw of items whose choices are scored: one for every run


@dataclass(frozen=True)
class LanguageItems:
    """Items whose right answers are measured, and whose choices are where they have some."""

    completions: Sequence[CompletionItem]  # the right answer of each
    choices: Sequence[ChoiceItem]  # those with choices
    digest: str  # of all token ids

    def __len__(self) -> int:
        return len(self.completions)

    def scoring(self, count: int) -> LanguageItems:
        """The same answers, with the choices of ``count`` items, drawn once for all runs."""
        drawn = np.sort(permutation(len(self.choices), _SEED)[:count])
        return replace(self, choices=[self.choices[index] for index in drawn])


class Language:
    """See `nalora_jax.study.subject.Subject`."""

    def __init__(self) -> None:
        self._models: dict[str, LoadedModel] = {}
        self._started: tuple[Assembly, Any, Assembly] | None = None

    def model(self, config: RunConfig) -> LoadedModel:
        """The run's base model."""
        compute = config.compute
        added = AddedTokens.of(config.data)
        key = json.dumps(
            [config.model, compute.dtype, compute.quantize, config.to_dict()["mesh"], added.plain, added.special]
        )
        if key not in self._models:
            kind = None if compute.quantize == "none" else compute.quantize
            mesh = distributed.smallest_mesh(config.mesh)
            loaded = load_model(config.model, dtype=compute.dtype, mesh=mesh, quantized=kind)
            self._models[key] = with_added(loaded, added, mesh)
        return self._models[key]

    def program(self, config: RunConfig) -> tuple[RunConfig, Any]:
        """Of the data only the length of the rows, and tokens that are added."""
        added = AddedTokens.of(config.data)
        shapes: dict[str, Any] = {"max_length": config.data.max_length}
        return replace(config, data=DataConfig()), shapes | ({"added": added.texts} if added else {})

    def assemble(self, general: RunConfig, config: RunConfig, last: optax.GradientTransformation) -> Assembly:
        """As ``nalora train`` does."""
        model = self.model(config)
        return assemble(general, model.config, model.params, distributed.smallest_mesh(config.mesh), last=last)

    def params(self, config: RunConfig, assembly: Assembly) -> Any:
        """The base's, less what adapters add at the start: PiSSA's of the base, LoRA-GA's of the run's own batches."""
        return self._started_at(config, assembly).params if config.lora.init == "lora_ga" else assembly.params

    def base(self, config: RunConfig) -> tuple[str, Any]:
        """The base model, whatever the seed."""
        return config.model, self.model(config).params

    def data(self, config: RunConfig) -> TrainData:
        """Packed rows."""
        tokenizer, train = self.model(config).tokenizer, config.train
        return train_data(
            config.data, tokenizer, batch_size=train.batch_size, accumulate=train.accumulate, seed=config.seed
        )

    def adapters(self, config: RunConfig, assembly: Assembly, data: TrainData, seed: int) -> Any:
        """By the config's initialisation."""
        model = self.model(config)
        if assembly.initial is not None:  # PiSSA: the base decides, no seed does
            return assembly.initial
        if config.lora.init == "lora_ga":  # the batches decide, on which `params` depends as well
            return self._started_at(config, assembly).initial
        if config.lora.init == "gradient":
            return first_adapters(assembly, model.config, data, seed)
        params = assembly.params if assembly.spec.starts_from_base else None
        return init_lora(model.config, assembly.spec, jax.random.key(seed), params)

    def _started_at(self, config: RunConfig, assembly: Assembly) -> Assembly:
        """The assembly of one run with LoRA-GA; the last one is kept."""
        rows = (config.seed, config.data)
        if self._started is None or self._started[0] is not assembly or self._started[1] != rows:
            self._started = None  # its kernels make room
            lora = first_adapters(assembly, self.model(config).config, self.data(config), config.seed)
            self._started = assembly, rows, starting_at(assembly, lora)
        return self._started[2]

    def items(self, config: RunConfig, data: DataConfig) -> LanguageItems:
        """Tokenized questions."""
        return _items(eval_examples(data, self.model(config).tokenizer))

    def check_apart(self, config: RunConfig, tuned: str, tested: str) -> None:
        """By the spans of both."""
        check_disjoint(open_source(config.data, tuned), open_source(config.data, tested))

    def measure(
        self, items: LanguageItems, assembly: Assembly, variables: Mapping[str, Any], *, whole: bool
    ) -> dict[str, float]:
        """``loss`` per answer token, and ``accuracy`` where there are choices."""
        model, mesh = assembly.eval_model, assembly.mesh if assembly.mesh.size > 1 else None
        values = {"loss": completion_loss(model, variables, items.completions, mesh=mesh).loss}
        if whole and items.choices:
            found = multiple_choice(model, variables, items.choices, per="character", mesh=mesh, samples=0)
            values["accuracy"] = found.accuracy
        return values


def _items(items: Sequence[Item]) -> LanguageItems:
    completions, choices = [], []
    for item in items:
        if isinstance(item, ChoiceItem):
            choices.append(item)
            prompt, answer = item.contexts[item.gold], item.choice_ids[item.gold]
            completions.append(CompletionItem(list(prompt), list(answer), item.prompt, item.choices[item.gold]))
        else:
            completions.append(item)
    ids = json.dumps([[list(one.prompt_ids), list(one.completion_ids)] for one in completions])
    return LanguageItems(completions, choices, hashlib.sha256(ids.encode()).hexdigest()[:16])
