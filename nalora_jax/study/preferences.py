"""Preference pairs in a study: the loss and the accuracy of a run with ``preference.loss``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nalora_jax.config import DataConfig, PreferenceConfig, RunConfig
from nalora_jax.data.packing import permutation
from nalora_jax.data.preference import Pair, PairData, pair_data, pairs_digest, tokenize_pairs
from nalora_jax.data.sources import open_pair
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.evaluate.preference import PreferenceEvaluator
from nalora_jax.layout import distributed
from nalora_jax.study.language import Language
from nalora_jax.study.subject import Items
from nalora_jax.train.inputs import stream_shape
from nalora_jax.train.program import Assembly

_SEED = 20260101  # of the held-out draw: the same in every run


@dataclass(frozen=True, eq=False)
class PreferenceItems(Items):
    """Held-out pairs, and the evaluator of the last assembly, which scores the reference once.

    Their digest is of the token ids of both completions with their prompts.
    """

    pairs: tuple[Pair, ...]
    preference: PreferenceConfig
    tokenizer: Tokenizer
    _evaluators: dict[int, tuple[Assembly, PreferenceEvaluator]] = field(default_factory=dict, repr=False)

    def evaluator(self, assembly: Assembly) -> PreferenceEvaluator:
        """Returns the evaluator of these pairs with the assembly's model and mesh."""
        if id(assembly) not in self._evaluators:
            model, mesh = assembly.eval_model, distributed.unless_single(assembly.mesh)
            evaluator = PreferenceEvaluator(model, self.tokenizer, self.pairs, self.preference, mesh=mesh)
            self._evaluators.clear()  # frees the arrays of an earlier run
            self._evaluators[id(assembly)] = assembly, evaluator  # keeps the assembly, so its id is unique
        return self._evaluators[id(assembly)][1]


class Preferences(Language):
    """`nalora_jax.study.subject.Subject` of language models that train on preference pairs.

    Its data are `PairData` and its items `PreferenceItems`; they are ``Any`` in that interface.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[Any, PairData] = {}

    def data(self, config: RunConfig) -> Any:
        """Returns packed pairs; they are tokenized once for all seeds."""
        data, key = config.data, (config.model, config.data, config.train)
        if key not in self._rows:
            source, _ = open_pair(data)
            tokenizer, shape = self.model(config).tokenizer, stream_shape(replace(config, seed=0))
            self._rows[key] = pair_data(source, data, config.preference, tokenizer, **shape)
        return replace(self._rows[key], seed=config.seed)

    def source_digest(self, data: Any) -> str:
        """Returns the digest of the tokenized pairs."""
        fingerprint: str = data.fingerprint
        return fingerprint.rsplit(":", 1)[0]  # without the seed

    def items(self, config: RunConfig, data: DataConfig) -> Any:
        """Returns tokenized pairs."""
        _, records = open_pair(data)
        indices = np.sort(permutation(len(records), _SEED)[: data.eval_limit or None]).tolist()
        tokenizer = self.model(config).tokenizer
        pairs = tuple(tokenize_pairs(records, indices, data, config.preference, tokenizer))
        return PreferenceItems(pairs_digest(pairs)[:16], len(pairs), pairs, config.preference, tokenizer)

    def measure(
        self, items: Any, assembly: Assembly, params: Any, lora: Any = None, *, whole: bool = False
    ) -> dict[str, float]:
        """Returns ``loss`` per pair, and ``accuracy``: the share of pairs whose chosen completion wins."""
        values = items.evaluator(assembly).measure(params, lora)
        return {"loss": values["loss"], "accuracy": values["rewards_accuracy"]}
