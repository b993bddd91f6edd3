"""Builds the pieces of a run on preference pairs before its first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from jax.sharding import Mesh

from nalora_jax.config import RunConfig
from nalora_jax.data.preference import held_out_pairs, pair_data, pairs_digest
from nalora_jax.data.source import Source
from nalora_jax.data.sources import open_pair
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.preference import PreferenceEvaluator
from nalora_jax.layout import distributed
from nalora_jax.method.step import TrainState
from nalora_jax.train.assembly import assemble
from nalora_jax.train.export import export
from nalora_jax.train.inputs import stream_shape
from nalora_jax.train.pieces import Pieces, assembly_of
from nalora_jax.weights.base import LoadedModel


def preference_pieces(
    config: RunConfig,
    loaded: LoadedModel,
    mesh: Mesh,
    source: Mapping[str, Source] | None,
    share: Callable[[str], None],
    like: Pieces | None = None,
) -> Pieces:
    """Builds adapters, step, pairs and evaluators of a run with ``preference.loss``.

    ``share`` is passed to `nalora_jax.train.export.export`; ``like`` are pieces of a run with the same
    program.

    Raises:
      NaloraError: bad records, pairs that do not fit, or too few held out.
    """
    data, preference = config.data, config.preference
    records, _ = open_pair(data, source=source)
    context = loaded.config.max_positions
    shape = stream_shape(config, mesh) | {"context": context}
    rows = pair_data(records, data, preference, loaded.tokenizer, **shape)
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

    questions = {"reported": pairs_digest(reported), "selecting": pairs_digest(selecting)}
    return Pieces(loaded, assembly, rows, evaluator, selector, questions, write)
