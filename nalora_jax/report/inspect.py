"""Gate statistics by layer, before or after training: table and plot of ``nalora inspect``.

The first part has pure functions of the statistics that the blocks write (`nalora_jax.method.ffn`),
the second runs texts through a model.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from nalora_jax.common import trees
from nalora_jax.common.files import write_atomically
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.loading.adapted import AdaptedModel
from nalora_jax.method import statistics
from nalora_jax.method.measurement import GateStatsConfig
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import depths, gate_blocks, layer_numbers, stacks
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.report.drawing import file_style
from nalora_jax.report.history import REGIONS
from nalora_jax.report.plots import stacked_bars
from nalora_jax.report.tables import number, text_table

# A channel is responsive if its mean slope is at least this share of its layer's mean slope.
RESPONSIVE = 0.5
CAPTION = (
    "slope: mean of |phi'| over tokens and channels. responsive: share of channels whose own mean "
    "|phi'| is at least half of their layer's mean (the squared soft mask gives the others less "
    "than a quarter of an update). Regions: share of pre-activations. misalignment: sum|S| / "
    "sum|F| of the adapter; limit: the same for a residual of the same direction and vanishing "
    "size (of a random direction where no adapter moves the gate), so that it changes in training, "
    "and as a rule falls."
)
_COLOURS = ("#b5382f", "#eda676", "#8fbfe0", "#2b63a8")


@dataclass(frozen=True)
class LayerSummary:
    """Per-layer means over real tokens, ``[L]`` each."""

    slope: np.ndarray  # E|phi'|, mean over channels
    responsive: np.ndarray  # share of channels, see `responsive_share`
    # [L, 4], shares of the regions inverted, contracting, expanding, linear
    occupancy: np.ndarray
    misalignment: np.ndarray  # sum|S| / sum|F|; NaN for a gate that no adapter changes
    limit: np.ndarray  # its linear limit; NaN in a layer without a probe residual
    names: tuple[str, ...] = ()  # of the rows; () for the numbers of layers


def merge_by_layer(
    summaries: Mapping[str, LayerSummary], layers: Mapping[str, Sequence[int]]
) -> LayerSummary:
    """Returns one summary of several blocks, in the order of the model's layers.

    Args:
      summaries: by path of the block, ``layers/ffn`` or ``layers/group0/block1/ffn/shared_ffn``.
      layers: the numbers of the layers of every stack, by prefix.
    """
    rows = []  # (number of the layer, name of the block in it, its summary, row of the summary)
    for path, summary in summaries.items():
        prefix = next(prefix for prefix in layers if path.startswith(f"{prefix}/"))
        within = path.removeprefix(f"{prefix}/")
        block = within.removeprefix("ffn").removeprefix("/")
        for index, layer in enumerate(layers[prefix]):
            rows.append((layer, block, summary, index))
    rows.sort(key=lambda row: row[:2])  # by layer, then block
    names = []
    columns = defaultdict[str, list[np.ndarray]](list)
    for layer, block, summary, index in rows:
        names.append(f"{layer} {block}".strip())
        for name in ("slope", "responsive", "occupancy", "misalignment", "limit"):
            values = getattr(summary, name)
            columns[name].append(values[index])
    stacked = {name: np.stack(values) for name, values in columns.items()}
    return LayerSummary(**stacked, names=tuple(names))


def layer_summary(
    stats: Mapping[str, Any], probe: Mapping[str, Any] | None = None
) -> LayerSummary:
    """Returns means per layer of one block's statistics.

    Args:
      stats: sums over real tokens: ``tokens [L, ...]``, ``slope [L, ..., C]``,
        ``occupancy [L, ..., 4, C]``, ``feature``, ``selection`` and ``linear`` ``[L, ..., C]``; the
        dots are an expert axis, or absent. Sums of several batches may be added up.
      probe: the same from a run with a small random residual. The linear limit is a property of the
        pre-activations and of the residual's direction, so the probe gives a limit before any
        training, when the adapter's limit is 0/0. The direction found by training has another
        limit, usually lower.

    Returns:
      The summary; the limit comes from ``probe`` in layers whose gate the adapter does not change.

    Raises:
      NaloraError: no real token went through a layer.
    """
    sums = _as_float64(stats)
    layers = sums["slope"].shape[0]
    channels = sums["slope"].shape[-1]
    counts = sums["tokens"].reshape(layers, -1)  # [L, E], with E = 1 without experts
    if not (counts.sum(1) > 0).all():
        raise NaloraError(
            "inspect: texts",
            expected="real tokens in every layer",
            found="none",
            remedy="give more text",
        )
    total = counts.sum(1) * channels  # [L], pre-activations
    by_region = np.moveaxis(sums["occupancy"], -2, 1)  # [L, 4, ..., C]
    occupancy = by_region.reshape(layers, 4, -1).sum(-1)  # [L, 4]
    slope = sums["slope"].reshape(layers, -1, channels)  # [L, E, C]
    misalignment = _ratio(sums, "selection")
    limit = _ratio(sums, "linear")
    if probe is not None:
        probed = _ratio(_as_float64(probe), "linear")
        limit = np.where(np.isnan(limit), probed, limit)
    return LayerSummary(
        slope=slope.sum((1, 2)) / total,
        responsive=responsive_share(slope, counts),
        occupancy=occupancy / total[:, None],
        misalignment=misalignment,
        limit=limit,
    )


def _as_float64(stats: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns statistics as float64 arrays, in which their sums are exact enough."""
    return {name: np.asarray(value, np.float64) for name, value in stats.items()}


def responsive_share(slope: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Returns the share of gate channels whose mean |phi'| is at least half their layer's mean.

    The threshold (`RESPONSIVE`) is relative to the layer, as the mask is: the soft mask with power
    2, (slope / mean)^2, gives the other channels less than a quarter of an update. The layer's mean
    slope shows if the layer as a whole responds.

    Args:
      slope: ``[L, E, C]`` sums of |phi'| over tokens, E the experts (1 without).
      tokens: ``[L, E]`` counts; experts without tokens are left out.

    Returns:
      ``[L]``, each expert weighted by its tokens.
    """
    counts = np.maximum(tokens, 1.0)
    mean = slope / counts[..., None]  # [L, E, C]
    threshold = RESPONSIVE * mean.mean(-1, keepdims=True)  # [L, E, 1]
    share = np.mean(mean >= threshold, axis=-1)  # [L, E]
    weighted = np.sum(share * tokens, axis=1)
    return weighted / np.sum(tokens, axis=1)


def layer_table(summary: LayerSummary, title: str = "") -> str:
    """Returns the summary as a table for the terminal, with the mean over layers last."""
    columns = _columns(summary)
    labels = summary.names or map(str, range(len(summary.slope)))
    rows = []
    for layer, label in enumerate(labels):
        row = [label]
        for name, values in columns.items():
            row.append(cell(values[layer], name))
        rows.append(row)
    means = ["mean"]
    for name, values in columns.items():
        means.append(cell(np.nanmean(values), name))
    rows.append(means)
    table = text_table(["layer", *columns], rows)
    return "\n".join([title, table, fill(CAPTION, 100)])


def cell(value: float, name: str) -> str:
    """Returns a value of the column ``name`` as text; NaN is a dash.

    Shares are in percent, limit and misalignment have 4 decimals, and other numbers 3.
    """
    if name in (*REGIONS, "responsive") and not np.isnan(value):
        return f"{value:.1%}"
    digits = 3
    if name in ("limit", "misalignment"):
        digits = 4
    return number(value, digits)


def save_picture(summary: LayerSummary, path: str | Path, title: str = "") -> Path:
    """Plots occupancy, slope and share, and misalignment into ``path`` (.png, .svg or .pdf).

    Raises:
      NaloraError: the suffix is not supported, or the file cannot be written.
    """
    path = check_picture(path)
    buffer = io.BytesIO()
    with file_style():
        figure = _draw(summary, title)
        figure.savefig(buffer, format=path.suffix[1:], dpi=150)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NaloraError(
            "--picture", expected="a file that can be written", found=error
        ) from error
    write_atomically(path, buffer.getvalue())
    return path


def check_picture(path: str | Path) -> Path:
    """Returns ``path`` if `save_picture` supports its suffix.

    Raises:
      NaloraError: the suffix is not supported.
    """
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise NaloraError(
            "--picture",
            expected="a name that ends in .png, .svg or .pdf",
            found=str(path),
        )
    return Path(path)


def _ratio(sums: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Returns the sum of a statistic over the sum of the feature movement |F|, per layer ``[L]``.

    It is NaN for a gate that no adapter changes.
    """
    layers = len(sums[name])
    total = sums[name].reshape(layers, -1).sum(1)
    feature = sums["feature"].reshape(layers, -1).sum(1)
    return total / np.where(feature > 0, feature, np.nan)


def _columns(summary: LayerSummary) -> dict[str, np.ndarray]:
    """Returns the table's columns by head, without columns that are NaN in every layer."""
    columns = {"slope": summary.slope, "responsive": summary.responsive}
    columns |= dict(zip(REGIONS, summary.occupancy.T, strict=True))
    columns |= {"limit": summary.limit, "misalignment": summary.misalignment}
    return {
        name: values for name, values in columns.items() if not np.isnan(values).all()
    }


def _draw(summary: LayerSummary, title: str) -> Figure:
    """Returns a figure of gate statistics by layer.

    Its first panel has bars of the occupancy, and each further panel the curves of two related
    statistics, if these have a finite value.
    """
    curves = [
        {"mean slope E|φ′|": summary.slope, "responsive share": summary.responsive},
        {"misalignment": summary.misalignment, "its linear limit": summary.limit},
    ]
    panels = []
    for panel in curves:
        measured = {}
        for label, values in panel.items():
            if np.isfinite(values).any():
                measured[label] = values
        if measured:
            panels.append(measured)
    rows = 1 + len(panels)
    figure = Figure(figsize=(7.0, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True)
    stacked_bars(axes[0], summary.occupancy, _COLOURS)
    axes[0].set(ylabel="share of tokens", title=title)
    axes[0].legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.02),
        ncols=4,
    )
    for axis, panel in zip(axes[1:], panels, strict=True):
        for label, values in panel.items():
            axis.plot(values, "o-", markersize=3.5, label=label)
        highest = max(map(np.nanmax, panel.values()))
        axis.set_ylim(0, 1.15 * highest)
        axis.legend()
    axes[-1].set_xlabel("layer")
    return figure


# ---------------------------------------------------------------- texts through a model

_ROWS = 8  # texts in one batch
PROBE_RANK = 8
PROBE_SIZE = 1e-3  # entries of B; small for later layers, the limit is invariant

TEXTS = (
    "The river had risen during the night, and by morning the lower fields were under water. "
    "Nobody in the village remembered a spring like it, although the old ferryman claimed that "
    "his grandfather had seen worse.",
    "Question: What do plants need to make their own food? Answer: Light, water and carbon "
    "dioxide. With the energy of light they turn carbon dioxide and water into sugar, and give "
    "off oxygen.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / count\n",
    '"Are you coming?" asked Nadia. Tom shook his head. "I promised my sister that I would help '
    "her move. Ask me again on Sunday, and I'll bring the cake that you like.\"",
    "In 1905 the committee met 14 times and spent 3,250 pounds, of which 1,100 went to the new "
    "bridge. The remaining 2,150 pounds were divided between the school, the harbour and the "
    "hospital.",
)


def inspect_texts(
    model: AdaptedModel,
    texts: Sequence[str] = TEXTS,
    *,
    max_length: int = 256,
    seed: int = 0,
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
    batches = list(batches_of_texts(model.base.tokenizer, texts, max_length))
    sums = _gate_sums(model.module, model.variables, batches)
    spec, lora = _probe(model, seed)
    probe = _gate_sums(
        replace(model.module, adapters=spec),
        {"params": model.base.params, "lora": lora},
        batches,
    )
    summaries = {block: layer_summary(sums[block], probe[block]) for block in sums}
    layers = {stack.prefix: stack.layers for stack in stacks(model.base.config)}
    return merge_by_layer(summaries, layers)


def _probe(model: AdaptedModel, seed: int) -> tuple[AdapterSpec, dict[str, Any]]:
    """Returns the spec and the arrays of a small random adapter on the gate of every layer."""
    config = model.base.config
    gates = set[str]()
    for block in gate_blocks(config):
        gates |= {f"{block}/gate_proj", f"{block}/in_proj"}
    targets = []
    for path in layer_numbers(config):
        if path in gates and path.startswith("layers/"):
            target = TargetSpec.even(PROBE_RANK, depths(config)[path])
            targets.append((path, target))
    spec = AdapterSpec(tuple(targets))
    a_key, b_key = jax.random.split(jax.random.key(seed))

    def fill(path: str, leaf: jax.Array) -> jax.Array:
        """Returns random entries for B, which is otherwise zero."""
        if not path.endswith("/b"):
            return leaf
        return PROBE_SIZE * jax.random.normal(b_key, leaf.shape, leaf.dtype)

    return spec, trees.map_named(fill, init_lora(config, spec, a_key))


def _gate_sums(
    module: Decoder,
    variables: dict[str, Any],
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the statistics of every gated block by path, summed over batches.

    The model adds zeros, the taps, at its gates such that the gradient of its output's sum with
    respect to a tap is the sum of a statistic (`nalora_jax.method.statistics`).
    """
    observed = replace(module, stats=GateStatsConfig(stride=1, probe_stride=1))
    zeros: dict[str, jax.Array] = {}
    for block, (shape, _) in gate_blocks(module.config).items():
        if block.startswith("layers/"):
            of_block = statistics.taps(statistics.STANDARD, shape)
            for name, tap in of_block.items():
                zeros[f"{block}/{name}"] = tap
    taps = trees.unflatten(zeros)

    @jax.jit
    def run(variables: dict[str, Any], tokens: jax.Array, segments: jax.Array) -> Any:
        """Returns the statistics of one batch, in the structure of the taps."""

        def output(taps: Any) -> jax.Array:
            tapped = {**variables, "gate_taps": taps}
            return jnp.sum(observed.apply(tapped, tokens, segment_ids=segments))

        return jax.grad(output)(taps)

    total: dict[str, dict[str, Any]] = {}
    for batch in batches:
        gradients = run(variables, *map(jnp.asarray, batch))
        for path, value in trees.flatten(gradients).items():
            block, _, name = path.rpartition("/")
            sums = total.setdefault(block, {})
            earlier = sums.get(name, 0.0)
            sums[name] = earlier + np.asarray(value, np.float64)
    if not total:
        raise NaloraError(
            "inspect",
            expected="a model with self-gated feed-forward blocks",
            found="one without",
        )
    return total


def batches_of_texts(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields tokens and segment ids ``[ROWS, longest]``, right-padded.

    All batches have one shape, so that one program is compiled.
    """
    encoded = [tokenizer.encode(text)[:max_length] for text in texts]
    rows = [ids for ids in encoded if ids]
    if not rows:
        raise NaloraError(
            "inspect: texts",
            expected="at least one text with a token in it",
            found=f"{len(texts)} texts",
        )
    longest = max(map(len, rows))
    for start in range(0, len(rows), _ROWS):
        tokens = np.zeros((_ROWS, longest), np.int32)
        segments = np.zeros((_ROWS, longest), np.int32)
        for row, ids in enumerate(rows[start : start + _ROWS]):
            tokens[row, : len(ids)] = ids
            segments[row, : len(ids)] = 1
        yield tokens, segments
