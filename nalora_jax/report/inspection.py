"""Runs texts through a model for ``nalora inspect``, before or after training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.common import trees
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.method import statistics
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import depths, gate_blocks, layer_numbers, stacks
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.report.inspect import LayerSummary, by_layer, layer_summary
from nalora_jax.train.adapted import AdaptedModel

ROWS = 8  # texts in one batch
PROBE_RANK = 8
PROBE_SIZE = 1e-3  # entries of B; small for later layers, the limit is invariant

TEXTS = (
    "The river had risen during the night, and by morning the lower fields were under water. "
    "Nobody in the village remembered a spring like it, although the old ferryman claimed that "
    "his grandfather had seen worse.",
    "Question: What do plants need to make their own food? Answer: Light, water and carbon "
    "dioxide. With the energy of light they turn carbon dioxide and water into sugar, and give "
    "off oxygen.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / count\n",
    '"Are you coming?" asked Nadia. Tom shook his head. "I promised my sister that I would help her move. Ask me again '
    "on Sunday, and I'll bring the cake that you like.\"",
    "In 1905 the committee met 14 times and spent 3,250 pounds, of which 1,100 went to the new "
    "bridge. The remaining 2,150 pounds were divided between the school, the harbour and the "
    "hospital.",
)


def inspect_texts(
    model: AdaptedModel, texts: Sequence[str] = TEXTS, *, max_length: int = 256, seed: int = 0
) -> LayerSummary:
    """Returns the gate statistics of ``model`` on ``texts``.

    Args:
      model: with an adapter or without.
      texts: run through the model unchanged.
      max_length: maximum tokens of each text.
      seed: seed of the random residual from which the linear limit is computed if no adapter
        changes the gate.

    Raises:
      NaloraError: the model's blocks have no gates, or the texts have no tokens.
    """
    batches = list(_batches(model.base.tokenizer, texts, max_length))
    sums = _gate_sums(model.module, model.variables, batches)
    spec, lora = _probe(model, seed)
    probe = _gate_sums(
        replace(model.module, adapters=spec), {"params": model.base.params, "lora": lora}, batches
    )
    summaries = {block: layer_summary(sums[block], probe[block]) for block in sums}
    return by_layer(summaries, {stack.prefix: stack.layers for stack in stacks(model.base.config)})


def _probe(model: AdaptedModel, seed: int) -> tuple[AdapterSpec, dict[str, Any]]:
    """Returns a small random adapter on the gate of every layer."""
    config = model.base.config
    gates = {f"{block}/{name}" for block in gate_blocks(config) for name in ("gate_proj", "in_proj")}
    paths = [path for path in layer_numbers(config) if path in gates and path.startswith("layers/")]
    targets = ((path, TargetSpec.even(PROBE_RANK, depths(config)[path])) for path in paths)
    spec = AdapterSpec(tuple(targets))
    a_key, b_key = jax.random.split(jax.random.key(seed))

    def fill(path: str, leaf: jax.Array) -> jax.Array:
        if not path.endswith("/b"):
            return leaf
        return PROBE_SIZE * jax.random.normal(b_key, leaf.shape, leaf.dtype)

    return spec, trees.map_named(fill, init_lora(config, spec, a_key))


def _gate_sums(
    module: Decoder, variables: dict[str, Any], batches: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the statistics of every gated block, summed over batches."""
    observed = replace(module, stats=GateStatsConfig(stride=1, probe_stride=1))
    zeros: dict[str, jax.Array] = {}
    for block, (shape, _) in gate_blocks(module.config).items():
        if block.startswith("layers/"):
            of_block = statistics.taps(statistics.STANDARD, shape)
            zeros |= {f"{block}/{name}": tap for name, tap in of_block.items()}
    taps = trees.unflatten(zeros)

    @jax.jit
    def run(variables: dict[str, Any], tokens: jax.Array, segments: jax.Array) -> Any:
        def output(taps: Any) -> jax.Array:
            return jnp.sum(observed.apply({**variables, "gate_taps": taps}, tokens, segment_ids=segments))

        return jax.grad(output)(taps)

    total: dict[str, dict[str, Any]] = {}
    for tokens, segments in batches:
        for path, value in trees.flatten(
            run(variables, jnp.asarray(tokens), jnp.asarray(segments))
        ).items():
            block, _, name = path.rpartition("/")
            sums = total.setdefault(block, {})
            sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64)
    if not total:
        raise NaloraError(
            "inspect", expected="a model with self-gated feed-forward blocks", found="one without"
        )
    return total


def _batches(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields tokens and segment ids ``[ROWS, longest]``, right-padded.

    All batches have one shape, so that one program is compiled.
    """
    rows = [ids for ids in (tokenizer.encode(text)[:max_length] for text in texts) if ids]
    if not rows:
        raise NaloraError(
            "inspect: texts", expected="at least one text with a token in it", found=f"{len(texts)} texts"
        )
    longest = max(map(len, rows))
    for start in range(0, len(rows), ROWS):
        tokens = np.zeros((ROWS, longest), np.int32)
        segments = np.zeros((ROWS, longest), np.int32)
        for row, ids in enumerate(rows[start : start + ROWS]):
            tokens[row, : len(ids)] = ids
            segments[row, : len(ids)] = 1
        yield tokens, segments
