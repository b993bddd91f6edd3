"""An adapter on its base in another precision than in training: accuracy, loss and logits.

    python train.py --output runs/precision                # an adapter trained on bfloat16 weights
    python benchmarks/other_precision.py runs/precision    # some minutes on two cores

The run's base is loaded as in training, and as int8 and nf4, whose errors are about those of usual
quantizations. Each is evaluated on the run's held-out examples, without the adapter and with it.
The last column compares next-token distributions with those on the base of training: the mean
Kullback-Leibler divergence in nats, over the completions' tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.config import config_from_dict
from nalora_jax.data.items import ChoiceItem
from nalora_jax.data.questions import held_out
from nalora_jax.data.sources import open_pair
from nalora_jax.evaluate.text import TextEvaluator
from nalora_jax.train.adapted import AdaptedModel, load

KINDS = ("none", "int8", "nf4")
_COMPARED = 100  # examples whose distributions are compared


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    run = parser.parse_args().run
    print("| base held as | accuracy, base | accuracy, adapter | loss, base | loss, adapter | divergence |")
    print("| --- | --- | --- | --- | --- | --- |")
    reference = None
    for kind in KINDS:
        model = load(run, quantize=kind)
        config = config_from_dict(model.located.run)
        items, _ = held_out(open_pair(config.data)[1], config.data, model.base.tokenizer)
        evaluator = TextEvaluator(model.module, model.base.tokenizer, items)
        before, after = (evaluator.measure(model.base.params, lora) for lora in (None, model.lora))
        computed = log_probabilities(model, items[:_COMPARED])
        reference = computed if reference is None else reference
        held = config.compute.dtype if kind == "none" else kind
        cells = (
            held,
            *(f"{values[name]:.3f}" for name in ("accuracy", "loss") for values in (before, after)),
        )
        print(f"| {' | '.join(cells)} | {divergence(reference, computed):.4f} |", flush=True)


def log_probabilities(model: AdaptedModel, items: Sequence[Any]) -> list[np.ndarray]:
    """Returns log-probabilities at the tokens of each correct completion: ``[tokens, vocab]``."""

    @jax.jit
    def logits(variables: Any, tokens: jax.Array) -> jax.Array:
        hidden = model.module.apply(variables, tokens)
        return jax.nn.log_softmax(
            model.module.apply(variables, hidden, method="unembed").astype(jnp.float32)
        )

    values = []
    for item in items:
        assert isinstance(item, ChoiceItem)
        prompt, answer = item.contexts[item.gold], item.choice_ids[item.gold]
        tokens = np.zeros(
            (1, -(-(len(prompt) + len(answer)) // 32) * 32), np.int32
        )  # few lengths, few programs
        tokens[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        span = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        values.append(np.asarray(logits(model.variables, tokens))[0, span])
    return values


def divergence(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """Returns the mean over tokens of KL(first || second), in nats."""
    rows = [np.sum(np.exp(p) * (p - q), axis=-1) for p, q in zip(first, second, strict=True)]
    return float(np.mean(np.concatenate(rows)))


if __name__ == "__main__":
    main()
