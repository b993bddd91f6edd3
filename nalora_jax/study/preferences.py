"""Preference pairs in a study: the loss and the accuracy of a run with ``preference.loss``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from nalora_jax.assembly import program
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.data import packing, preference_pairs, sources
from nalora_jax.evaluate.preference_evaluation import PreferenceEvaluator
from nalora_jax.kinds import inputs
from nalora_jax.mesh import distributed
from nalora_jax.study.language import Items, Language, LanguageItems

_SEED = 20260101  # of the held-out draw: the same in every run


class Preferences(Language):
    """Language models that train on preference pairs; their data are packed pairs."""

    accuracy_items: ClassVar[str] = "none for pairs: the loss scores both completions"
    same_examples: ClassVar[str] = (
        "0 for pairs: a slice as train[:1000] is the same for every seed"
    )

    @classmethod
    def unit(cls, config: RunConfig) -> str:
        """Returns the unit of the loss, for tables."""
        return "nats per pair"

    def data(self, config: RunConfig) -> Any:
        """Returns packed pairs; they are tokenized once for all seeds."""
        tokenizer = self.model(config).tokenizer
        shape = inputs.stream_shape(replace(config, seed=0))

        def pack() -> Any:
            """Returns the packed pairs of the training split."""
            source, _ = sources.open_pair(config.data)
            return preference_pairs.pair_data(
                source, config.data, config.preference, tokenizer, **shape
            )

        return replace(
            self.once(("rows", config.model, config.data, config.train), pack),
            seed=config.seed,
        )

    def source_digest(self, data: Any) -> str:
        """Returns the digest of the tokenized pairs."""
        fingerprint: str = data.fingerprint
        return fingerprint.rsplit(":", 1)[0]  # without the seed

    def items(self, config: RunConfig, data: DataConfig) -> Items:
        """Returns tokenized held-out pairs, at most ``data.eval_limit``, drawn by a fixed seed.

        Their digest is of the ids of both completions with their prompts.
        """
        _, records = sources.open_pair(data)
        order = packing.permutation(len(records), _SEED)
        drawn = order[: data.eval_limit or None]  # 0: all
        indices = np.sort(drawn).tolist()
        tokenizer = self.model(config).tokenizer
        pairs = tuple(
            preference_pairs.tokenize_pairs(
                records, indices, data, config.preference, tokenizer
            )
        )
        return Items(
            preference_pairs.pairs_digest(pairs)[:16], len(pairs), config, pairs
        )

    def measure(
        self,
        items: Any,
        assembly: program.Assembly,
        params: Any,
        lora: Any = None,
        *,
        whole: bool = False,
    ) -> dict[str, float]:
        """Returns ``loss`` per pair and ``accuracy``.

        The accuracy is the share of pairs whose chosen completion has the larger reward.
        Completions of a probe have the measures of `Language`.
        """
        if isinstance(items, LanguageItems):
            return super().measure(items, assembly, params, lora, whole=whole)

        def make() -> PreferenceEvaluator:
            """Returns the evaluator of these items, which scores the base once."""
            tokenizer = self.model(items.config).tokenizer
            mesh = distributed.multi_device_mesh(assembly.mesh)
            settings = items.config.preference
            return PreferenceEvaluator(
                assembly.eval_model, tokenizer, items.asked, settings, mesh=mesh
            )

        # The process keeps its assemblies, so that an id is of one of them.
        values = self.once(("evaluator", items.digest, id(assembly)), make).measure(
            params, lora
        )
        return {"loss": values["loss"], "accuracy": values["rewards_accuracy"]}
