"""Language models in a study: completions, and held-out items with or without choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import numpy as np
import optax

from nalora_jax.common.digests import json_digest
from nalora_jax.config import DataConfig, MeshConfig, RunConfig
from nalora_jax.data.items import ChoiceItem, CompletionItem, Item
from nalora_jax.data.packing import permutation
from nalora_jax.data.pipeline import TrainData, train_data
from nalora_jax.data.questions import eval_examples
from nalora_jax.data.sources import check_disjoint, open_source
from nalora_jax.data.tokenizer import AddedTokens
from nalora_jax.evaluate.text import TextEvaluator
from nalora_jax.layout import distributed
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.study.subject import Items, Subject
from nalora_jax.train.initial_adapter import read_initial
from nalora_jax.train.inputs import stream_shape
from nalora_jax.train.kinds import decoder_parts
from nalora_jax.train.program import Assembly, assemble, starting_at
from nalora_jax.train.start import first_adapters
from nalora_jax.weights.base import load_model
from nalora_jax.weights.hf import ResolvedSource
from nalora_jax.weights.hub import resolve_source
from nalora_jax.weights.model_files import LoadedModel, open_files
from nalora_jax.weights.new_tokens import with_added

_SEED = 20260104  # seed of the draw of items whose choices are scored, the same for every run


@dataclass(frozen=True, eq=False)
class LanguageItems(Items):
    """Items whose completions give the loss, and whose choices, if any, give the accuracy.

    Their digest is of the token ids of prompts and correct completions.
    """

    completions: Sequence[CompletionItem]  # the correct completion of each item
    choices: Sequence[ChoiceItem]  # the items with choices

    @property
    def digests(self) -> dict[str, str]:
        """Returns the digest of prompts and completions, and the digest of any choices."""
        if not self.choices:
            return super().digests
        ids = [[[list(ids) for ids in item.choice_ids], item.gold] for item in self.choices]
        return super().digests | {"choices": _digest(ids)}

    def scoring(self, count: int) -> LanguageItems:
        """Returns the completions with the choices of ``count`` items, drawn once for all runs."""
        drawn = np.sort(permutation(len(self.choices), _SEED)[:count])
        return replace(self, choices=[self.choices[index] for index in drawn])


class Language(Subject):
    """`nalora_jax.study.subject.Subject` of language models."""

    def __init__(self) -> None:
        self._load = cache(_load)
        self._started: tuple[Assembly, Any, Assembly] | None = None

    def model(self, config: RunConfig) -> LoadedModel:
        """Returns the run's base model."""
        added = AddedTokens.of(config.data)
        return self._load(
            config.model,
            config.rope_scaling,
            config.compute.dtype,
            config.compute.quantized,
            config.mesh,
            added,
        )

    def architecture(self, config: RunConfig) -> ModelConfig:
        """Returns the config of the base."""
        files = open_files(_files(config.model, config.rope_scaling))
        return files.described(AddedTokens.of(config.data))

    def program(self, config: RunConfig) -> tuple[RunConfig, Any]:
        """Returns ``config`` without its data, and the data's length and added tokens."""
        facts = config.data.max_length, AddedTokens.of(config.data)
        return replace(config, data=DataConfig()), facts

    def assemble(
        self, general: RunConfig, config: RunConfig, last: optax.GradientTransformation
    ) -> Assembly:
        """Assembles the run as ``nalora train`` does."""
        model = self.model(config)
        mesh, parts = distributed.smallest_mesh(config.mesh), decoder_parts(general, model.config)
        return assemble(general, model.config, model.params, mesh, last=last, **parts)

    def params(self, config: RunConfig, assembly: Assembly) -> Any:
        """Returns the base minus the initial adapters.

        PiSSA's initial adapters depend on the base, LoRA-GA's on the run's batches.
        """
        if config.lora.init == "lora_ga":
            return self._started_at(config, assembly).params
        return assembly.params

    def base(self, config: RunConfig) -> tuple[str, Any]:
        """Returns the base model, the same for every seed."""
        return config.model, self.model(config).params

    def base_digest(self, config: RunConfig) -> str:
        """Returns the digest of all weights in the base's files."""
        return self.model(config).fingerprint

    def source_digest(self, data: TrainData) -> str:
        """Returns the digest of the tokenized examples."""
        return data.store.fingerprint

    def data(self, config: RunConfig) -> TrainData:
        """Returns packed sequences."""
        return train_data(config.data, self.model(config).tokenizer, **stream_shape(config))

    def adapters(self, config: RunConfig, assembly: Assembly, data: TrainData, seed: int) -> Any:
        """Returns adapters by the config's initialization."""
        model = self.model(config)
        if config.adapter:
            return read_initial(config, model)
        if assembly.initial is not None:  # PiSSA: determined by the base, not by the seed
            return assembly.initial
        if config.lora.init == "lora_ga":  # determined by the batches, like `params`
            return self._started_at(config, assembly).initial
        if config.lora.init == "gradient":
            return first_adapters(assembly, model.config, data, seed)
        return init_lora(model.config, assembly.spec, jax.random.key(seed), assembly.params)

    def _started_at(self, config: RunConfig, assembly: Assembly) -> Assembly:
        """Returns the assembly of a run with LoRA-GA; caches the last one."""
        rows = (config.seed, config.data)
        if self._started is None or self._started[0] is not assembly or self._started[1] != rows:
            self._started = None  # frees its kernels before new ones are allocated
            base = self.model(config).config
            lora = first_adapters(assembly, base, self.data(config), config.seed)
            self._started = assembly, rows, starting_at(assembly, lora)
        return self._started[2]

    def items(self, config: RunConfig, data: DataConfig) -> LanguageItems:
        """Returns tokenized examples."""
        return self.probe(config, data)

    def probe(self, config: RunConfig, data: DataConfig) -> LanguageItems:
        """Returns tokenized examples."""
        return _items(eval_examples(data, self.model(config).tokenizer))

    def check_apart(self, config: RunConfig, tuned: str, tested: str) -> None:
        """Compares the spans of both splits."""
        check_disjoint(open_source(config.data, tuned), open_source(config.data, tested))

    def measure(
        self, items: Any, assembly: Assembly, params: Any, lora: Any = None, *, whole: bool = False
    ) -> dict[str, float]:
        """Returns ``loss`` per completion token, and ``accuracy`` if there are choices."""
        model, mesh = assembly.eval_model, distributed.unless_single(assembly.mesh)
        scored = TextEvaluator(model, None, items.completions, mesh=mesh)
        values = {"loss": scored.measure(params, lora)["loss"]}
        if whole and items.choices:
            answered = TextEvaluator(model, None, items.choices, mesh=mesh)
            values["accuracy"] = answered.measure(params, lora)["accuracy"]
        return values


def _files(model: str, rope_scaling: str) -> ResolvedSource:
    return replace(resolve_source(model), rope_scaling=rope_scaling)


def _load(
    model: str, rope_scaling: str, dtype: str, quantized: Any, mesh_config: MeshConfig, added: AddedTokens
) -> LoadedModel:
    mesh = distributed.smallest_mesh(mesh_config)
    loaded = load_model(_files(model, rope_scaling), dtype=dtype, mesh=mesh, quantized=quantized)
    return with_added(loaded, added, mesh)


def _items(items: Sequence[Item]) -> LanguageItems:
    completions, choices = [], []
    for item in items:
        if isinstance(item, ChoiceItem):
            choices.append(item)
            prompt, answer = item.contexts[item.gold], item.choice_ids[item.gold]
            completions.append(
                CompletionItem(list(prompt), list(answer), item.prompt, item.choices[item.gold])
            )
        else:
            completions.append(item)
    ids = [[list(item.prompt_ids), list(item.completion_ids)] for item in completions]
    return LanguageItems(_digest(ids), len(completions), completions, choices)


def _digest(ids: Any) -> str:
    return json_digest(ids)[:16]
