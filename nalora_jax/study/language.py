"""Language models in a study: completions, and held-out items with or without choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
import optax

from nalora_jax.assembly import start
from nalora_jax.assembly.program import Assembly, assemble
from nalora_jax.common.digests import json_digest
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.data import packing, pipeline, questions, sources, tokenizer
from nalora_jax.data.items import ChoiceItem, CompletionItem
from nalora_jax.evaluate.text_evaluation import TextEvaluator
from nalora_jax.kinds import inputs
from nalora_jax.kinds.record import run_kind
from nalora_jax.loading import initial_adapter
from nalora_jax.mesh import distributed
from nalora_jax.method.step import Step
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.weights import model_files, new_tokens
from nalora_jax.weights.base import load_model

_SEED = 20260104  # seed of the draw of items whose choices are scored, the same for every run
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Items:
    """Fixed items to measure: pairs of completions, prompts, or what a subclass has."""

    digest: str  # changes if the items change
    count: int
    config: RunConfig  # of a run that asks them
    asked: Any = ()

    @property
    def digests(self) -> dict[str, str]:
        """Returns all digests of the items, by name; `digest` has the name ""."""
        return {"": self.digest}


class Subject:
    """A kind of model and its tasks; it keeps models and data for the life of the process.

    In every method, ``config`` is the settings of one run.

    Attributes:
      trains_together: True if several runs may train in one program.
      reads_images: True for images, False for texts.
      accuracy_items: why ``accuracy_items`` must be 0; "" if choices can be scored.
      same_examples: why ``data.train_limit`` must be 0; "" if it may be set.
    """

    trains_together: ClassVar[bool] = True
    reads_images: ClassVar[bool] = False
    accuracy_items: ClassVar[str] = ""
    same_examples: ClassVar[str] = ""

    @classmethod
    def unit(cls, config: RunConfig) -> str:
        """Returns the unit of the loss, for tables."""
        return "nats per answer token"

    @classmethod
    def metric(cls, config: RunConfig) -> str:
        """Returns the metric besides the loss that is measured during training; "" without."""
        return ""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Returns the result of ``make``, which is called once for each key."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def architecture(self, config: RunConfig) -> ModelConfig | None:
        """Returns the base's architecture without reading weights.

        It is None for kinds of models whose memory is not estimated.
        """
        return None

    def step(self, config: RunConfig, assembly: Assembly, data: Any) -> Step:
        """Returns the training step of a run on its rows."""
        return assembly.step


@dataclass(frozen=True, eq=False)
class LanguageItems(Items):
    """Items whose completions give the loss, and whose choices, if any, give the accuracy.

    ``asked`` are the correct completions of all items; the digest is of the ids of prompts and
    completions.
    """

    choices: Sequence[ChoiceItem] = ()  # the items with choices

    @property
    def digests(self) -> dict[str, str]:
        """Returns the digest of prompts and completions, and the digest of any choices."""
        if not self.choices:
            return super().digests
        content = []
        for item in self.choices:
            choice_ids = [list(ids) for ids in item.choice_ids]
            content.append([choice_ids, item.gold])
        return super().digests | {"choices": json_digest(content)[:16]}

    def scoring(self, count: int) -> LanguageItems:
        """Returns these items with the choices of ``count`` of them, drawn by a fixed seed."""
        drawn = np.sort(packing.permutation(len(self.choices), _SEED)[:count])
        return replace(self, choices=[self.choices[index] for index in drawn])


class Language(Subject):
    """Language models that train on texts."""

    # Of the last run with LoRA-GA: its compiled assembly, seed and data, and the assembly that
    # starts at its adapters.
    _started: tuple[Assembly, Any, Assembly] | None = None

    def model(self, config: RunConfig) -> model_files.LoadedModel:
        """Returns the run's base model."""
        compute = config.compute
        added = tokenizer.AddedTokens.of(config.data)

        def load() -> model_files.LoadedModel:
            """Reads the weights, and adds rows for new tokens."""
            mesh = distributed.smallest_mesh(config.mesh)
            options: dict[str, Any] = {"mesh": mesh, "quantized": compute.quantized}
            return new_tokens.add_tokens(
                load_model(inputs.resolve_base(config), dtype=compute.dtype, **options),
                added,
                mesh,
            )

        weights = config.model, config.rope_scaling, compute.dtype, compute.quantized
        return self.once(("model", *weights, config.mesh, added), load)

    def architecture(self, config: RunConfig) -> ModelConfig:
        """Returns the config of the base."""
        return model_files.open_files(inputs.resolve_base(config)).described(
            tokenizer.AddedTokens.of(config.data)
        )

    def program(self, config: RunConfig) -> tuple[RunConfig, Any]:
        """Returns what determines the compiled step: settings, and hashable facts of the data."""
        facts = config.data.max_length, tokenizer.AddedTokens.of(config.data)
        return replace(config, data=DataConfig()), facts

    def assemble(
        self, general: RunConfig, config: RunConfig, last: optax.GradientTransformation
    ) -> Assembly:
        """Returns adapters, optimizer and step for the result of `program` for ``config``."""
        model = self.model(config)
        mesh = distributed.smallest_mesh(config.mesh)
        parts = run_kind(general).parts(general)
        made = assemble(general, model.config, model.params, mesh, last=last, **parts)
        if general.lora.init == "pissa":
            return start.split_components(made)
        return made

    def params(self, config: RunConfig, assembly: Assembly) -> Any:
        """Returns the frozen weights of a run: the base minus the initial adapters.

        PiSSA's initial adapters depend on the base, LoRA-GA's on the run's batches.
        """
        if config.lora.init == "lora_ga":
            return self._started_at(config, assembly).params
        return assembly.params

    def base(self, config: RunConfig) -> tuple[str, Any]:
        """Returns a name that is unique to the base, and its weights without an adapter."""
        return config.model, self.model(config).params

    def base_digest(self, config: RunConfig) -> str:
        """Returns the digest of all weights in the base's files, the same for every seed."""
        return self.model(config).fingerprint

    def data(self, config: RunConfig) -> Any:
        """Returns the training rows, packed sequences, in the order of the seed.

        They have a ``fingerprint``, which changes if the rows or their order change.
        """
        return pipeline.train_data(
            config.data, self.model(config).tokenizer, **inputs.stream_shape(config)
        )

    def source_digest(self, data: pipeline.TrainData) -> str:
        """Returns the digest of the tokenized examples of `data`, the same for every seed."""
        return data.store.fingerprint

    def adapters(
        self, config: RunConfig, assembly: Assembly, data: Any, seed: int
    ) -> Any:
        """Returns adapters by the config's initialization, with A drawn by ``seed``."""
        model = self.model(config)
        if config.adapter:
            return initial_adapter.read_initial(config, model)
        # PiSSA: determined by the base, not by the seed
        if assembly.initial is not None:
            return assembly.initial
        if config.lora.init == "lora_ga":  # determined by the batches, like `params`
            return self._started_at(config, assembly).initial
        if config.lora.init == "gradient":
            return start.first_adapters(assembly, model.config, data, seed)
        return init_lora(
            model.config, assembly.spec, jax.random.key(seed), assembly.params
        )

    def _started_at(self, config: RunConfig, assembly: Assembly) -> Assembly:
        """Returns the assembly of a run with LoRA-GA, which starts at adapters of its batches.

        The last one is kept, since a run asks for it several times.
        """
        rows = (config.seed, config.data)
        if (
            self._started is None
            or self._started[0] is not assembly
            or self._started[1] != rows
        ):
            self._started = None  # frees its kernels before new ones are allocated
            lora = start.first_adapters(
                assembly, self.model(config).config, self.data(config), config.seed
            )
            self._started = assembly, rows, start.start_from(assembly, lora)
        return self._started[2]

    def items(self, config: RunConfig, data: DataConfig) -> Any:
        """Returns the tokenized held-out examples of ``data.eval_split``.

        They are `Items`, at most ``data.eval_limit``.
        """
        return self.probe(config, data)

    def probe(self, config: RunConfig, data: DataConfig) -> Any:
        """Returns the tokenized examples of ``data``, which may be other data than the run's."""
        completions = []
        choices = []
        for item in questions.eval_examples(data, self.model(config).tokenizer):
            if isinstance(item, ChoiceItem):
                choices.append(item)
                gold = item.gold
                ids = list(item.contexts[gold]), list(item.choice_ids[gold])
                item = CompletionItem(*ids, item.prompt, item.choices[gold])
            completions.append(item)
        content = []
        for item in completions:
            content.append([list(item.prompt_ids), list(item.completion_ids)])
        digest = json_digest(content)[:16]
        return LanguageItems(digest, len(completions), config, completions, choices)

    def check_apart(self, config: RunConfig, tuned: str, tested: str) -> None:
        """Checks that two splits of the run's data share no record.

        Raises:
          NaloraError: they do.
        """
        tuning_source = sources.open_source(config.data, tuned)
        test_source = sources.open_source(config.data, tested)
        sources.check_disjoint(tuning_source, test_source)

    def measure(
        self,
        items: Any,
        assembly: Assembly,
        params: Any,
        lora: Any = None,
        *,
        whole: bool = False,
    ) -> dict[str, float]:
        """Returns the measures of an adapter, or of the weights alone if ``lora`` is None.

        They are the ``loss`` per completion token and, with ``whole``, measures that need separate
        programs: the ``accuracy`` if there are choices.
        """
        model = assembly.eval_model
        mesh = distributed.multi_device_mesh(assembly.mesh)
        scored = TextEvaluator(model, None, items.asked, mesh=mesh)
        values = {"loss": scored.measure(params, lora)["loss"]}
        if whole and items.choices:
            answered = TextEvaluator(model, None, items.choices, mesh=mesh)
            values["accuracy"] = answered.measure(params, lora)["accuracy"]
        return values
