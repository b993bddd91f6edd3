"""Builds the pieces of a run on preference pairs before its first step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from nalora_jax import distributed
from nalora_jax.config import RunConfig
from nalora_jax.data.preference import Pair, held_out_pairs, pair_data
from nalora_jax.data.source import Source
from nalora_jax.data.sources import open_pair
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.preference import PreferenceEvaluator
from nalora_jax.loading.base import LoadedModel
from nalora_jax.method.step import TrainState
from nalora_jax.runs.export import export
from nalora_jax.runs.pieces import Pieces, assembly_of
from nalora_jax.train.assembly import assemble


def preference_pieces(
    config: RunConfig,
    loaded: LoadedModel,
    mesh: Mesh,
    source: Mapping[str, Source] | None,
    share: Callable[[str], None],
    like: Pieces | None = None,
) -> Pieces:
    """Builds adapters, step, pairs and evaluators of a run with ``preference.loss``.

    ``share`` is passed to `nalora_jax.runs.export.export`; ``like`` are pieces of a run with the same
    program.

    Raises:
      NaloraError: bad records, pairs that do not fit, or too few held out.
    """
    train, data, preference = config.train, config.data, config.preference
    records, _ = open_pair(data, source=source)
    rows = pair_data(
        records,
        data,
        preference,
        loaded.tokenizer,
        batch_size=train.batch_size,
        accumulate=train.accumulate,
        seed=config.seed,
        rows=distributed.process_rows(mesh, train.batch_size // train.accumulate).tolist(),
    )
    context = loaded.config.max_positions
    reported, selecting = held_out_pairs(data, preference, loaded.tokenizer, context, source=source)
    longest = int(max(b - a for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True))) - 1
    if longest > context:
        raise NaloraError(
            "training data",
            expected=f"answers with their prompts of at most {context} tokens, the model's context",
            found=f"one of {longest}",
            remedy=f"set --data.max-length to {2 * context} or less",
        )
    assembly = assemble(config, loaded.config, loaded.params, mesh, like=assembly_of(like))
    sharded = distributed.unless_single(mesh)
    if like is not None and like.assembly.spec == assembly.spec:
        evaluator, selector = like.evaluator, like.selector
    else:
        evaluator, selector = (
            PreferenceEvaluator(assembly.eval_model, loaded.tokenizer, pairs_of, preference, mesh=sharded)
            for pairs_of in (reported, selecting)
        )

    def write(folder: Path, state: TrainState) -> Path:
        return export(config, folder, loaded, assembly, state, rows.batches(), share)

    questions = {"reported": _digest(reported), "selecting": _digest(selecting)}
    return Pieces(loaded, assembly, rows, evaluator, selector, questions, write)


def _digest(pairs: Sequence[Pair]) -> str:
    """Returns the SHA-256 of pairs; equal for equal pairs in the same order."""
    sha256 = hashlib.sha256()
    for pair in pairs:
        for example in (pair.chosen, pair.rejected):
            sha256.update(example.ids.tobytes() + example.answer.tobytes() + b"|")
    return sha256.hexdigest()
