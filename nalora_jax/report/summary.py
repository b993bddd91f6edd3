"""The top of the report: the metric before and after, its origin, and the run's main figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nalora_jax.data.items import FEW
from nalora_jax.report.history import EvaluationScore, History
from nalora_jax.train.progress import duration


def headline(history: History) -> dict[str, Any] | None:
    """Returns the headline metric before and after training on a common scale, or None."""
    if history.metric is None:
        return None
    _, name, more_is_better = history.metric
    outcome = history.outcome
    if not outcome:
        return None
    chance = history.ends[-1]["eval"].get("chance")
    edges = [edge for s in outcome for edge in (s.low, s.value, s.high) if edge is not None]
    edges += [chance] if chance is not None else []
    low, high = min(edges), max(edges)
    pad = 0.08 * (high - low) or 1.0
    scale = (low - pad, high + pad)
    labels, source = [f"step {outcome[0].step}"], ""
    if len(outcome) == 2:
        labels, source = ["before", "after"], _source(history)
    return {
        "name": name,
        "rows": [_range(label, score, scale) for label, score in zip(labels, outcome, strict=True)],
        "ends": [f"{edge:.2f}" for edge in scale],
        "chance": None if chance is None else {"value": f"{chance:.2f}", "at": _at(chance, scale)},
        "verdict": _verdict(outcome, more_is_better, history.final.get("eval", {}).get("paired")),
        "n": outcome[-1].n,
        "source": source,
    }


def _source(history: History) -> str:
    """Returns a description of the evaluations before and after."""
    before, after = history.ends
    at = before["step"]
    first = "the base model, before the first step"
    if history.config.get("adapter"):
        first = "the adapter that the run continues, before the first step"
    if at:
        first = f"the evaluation at step {at}"
    if "final" not in after:
        return (
            f"Before: {first}. After: the evaluation at step {after['step']}. Both on the "
            "examples that select the checkpoint: the result has not been evaluated."
        )
    last = f"the adapter of step {after['step']}, which was exported"
    same = ""
    if "initial" in before:
        same = " Both on the same examples, which were not used to select the checkpoint."
    plain = ""
    if history.unreached_step is not None:
        plain = f" It is plain LoRA: mechanisms act from step {history.unreached_step}."
    return f"Before: {first}. After: {last}.{same}{_choice(history)}{plain}"


def _choice(history: History) -> str:
    """Returns the number of examples that chose the checkpoint, as text; "" if none was chosen."""
    along = [record["eval"].get("n") for record in history.evals if record["step"] > 0]
    if len(along) < 2 or not (last := along[-1]):
        return ""
    few = ""
    if last < FEW:
        few = ", too few to distinguish checkpoints: the selection is mostly chance"
    return f" It was selected on {last} other examples{few}."


def _range(label: str, score: EvaluationScore, scale: tuple[float, float]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "label": label,
        "value": f"{score.value:.3f}",
        "at": _at(score.value, scale),
        "interval": None,
    }
    if score.low is not None and score.high is not None:
        width = f"{100 * (score.high - score.low) / (scale[1] - scale[0]):.1f}%"
        row |= {
            "interval": f"{score.low:.3f} to {score.high:.3f}",
            "low": _at(score.low, scale),
            "width": width,
        }
    return row


def _at(value: float, scale: tuple[float, float]) -> str:
    return f"{100 * (value - scale[0]) / (scale[1] - scale[0]):.1f}%"


def _verdict(
    scores: Sequence[EvaluationScore], more_is_better: bool, paired: Mapping[str, Any] | None
) -> str:
    """Returns one sentence about the difference, from paired items if the last evaluation has them.

    Args:
      scores: before and after, or one of them.
      more_is_better: True if a higher metric is better.
      paired: a `nalora_jax.evaluate.statistics.Comparison` as a dict, or None.
    """
    if len(scores) < 2:
        return ""
    gain = scores[1].value - scores[0].value
    if gain == 0:
        return "No change."
    change = f"{gain:+.3f}, {'better' if (gain > 0) == more_is_better else 'worse'}"
    if paired:
        interval = f"95% of the difference, item by item: {paired['low']:+.3f} to {paired['high']:+.3f}"
        counts = f"{paired['gained']} gained, {paired['lost']} lost, p = {paired['p_value']:.2g}"
        return f"{change} ({interval}; {counts})."
    apart = _apart(scores[0], scores[1])
    if apart is None:
        return f"{change}."
    overlap = "do not overlap" if apart else "overlap: more items are needed for a conclusion"
    return f"{change}; the intervals {overlap}."


def _apart(first: EvaluationScore, second: EvaluationScore) -> bool | None:
    """Returns True if two intervals do not overlap; None if an interval is unknown."""
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return None
    return first.high < second.low or second.high < first.low


def tiles(history: History) -> Iterator[tuple[str, str, str]]:
    """Yields (name, value, note) of the small boxes at the top."""
    ends = [record["eval"] for record in history.ends]
    losses = [values["loss"] for values in ends if values.get("loss") is not None]
    if len(losses) > 1:
        change = f"{losses[0]:.3f} → {losses[-1]:.3f}"
        yield "Held-out loss", change, "before → after, lower is better"
    speed = history.column("tokens_per_second")[1]
    if np.isfinite(speed).any():
        tokens, note = history.total("tokens"), "median"
        if tokens:
            note = f"median; {tokens:,.0f} tokens"
        yield "Tokens per second", f"{np.nanmedian(speed):,.0f}", note
    yield from _costs(history)


def _costs(history: History) -> Iterator[tuple[str, str, str]]:
    """Yields wall time by stage, and peak memory."""
    stages = {
        name: value for name, value in (history.done.get("seconds") or {}).items() if value is not None
    }
    if stages:
        since = ""
        if history.resumed:
            since = f" (since step {history.resumed[-1]})"
        parts = ", ".join(f"{name} {duration(value)}" for name, value in stages.items())
        yield f"Wall time{since}", duration(sum(stages.values())), parts
    device, host = history.last("peak_device_memory"), history.last("peak_memory")
    if device:
        also = "of the fullest device"
        if host:
            also = f"of the fullest device; {_size(host)} of the host"
        yield "Peak memory", _size(device), also
    elif host:
        yield "Peak memory", _size(host), "of the process, until the last log step"


def _size(count: float) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB"
