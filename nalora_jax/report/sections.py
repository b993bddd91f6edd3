"""What the sections of a report show: the metric before and after, main figures, samples, images,
needles."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.data.items import FEW
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.run_log import ROLLOUTS
from nalora_jax.report.history import EvaluationScore, History
from nalora_jax.train.progress import duration

SHOWN = 8  # samples on the page
_WRONG = "wrong both times"
_CHANGES = {
    (False, True): "gained",
    (True, False): "lost",
    (True, True): "right both times",
    (False, False): _WRONG,
}
LONGEST_SAMPLE = 1200  # maximum characters shown of a sample's completion
_LONGEST_PROMPT = 20_000  # maximum characters of an unfolded prompt
_PROMPT_ENDS = (
    320  # characters at both ends of a long prompt; the page unfolds the middle
)


def headline(history: History) -> dict[str, Any] | None:
    """Returns the headline metric before and after training on a common scale, or None."""
    if history.metric is None:
        return None
    _, name, more_is_better = history.metric
    outcome = history.outcome
    if not outcome:
        return None
    chance = history.ends[-1]["eval"].get("chance")
    edges = [
        edge for s in outcome for edge in (s.low, s.value, s.high) if edge is not None
    ]
    edges += [chance] if chance is not None else []
    low = min(edges)
    high = max(edges)
    pad = 0.08 * (high - low) or 1.0
    scale = (low - pad, high + pad)
    labels = [f"step {outcome[0].step}"]
    source = ""
    if len(outcome) == 2:
        labels = ["before", "after"]
        source = _source(history)
    return {
        "name": name,
        "rows": [
            _range(label, score, scale)
            for label, score in zip(labels, outcome, strict=True)
        ],
        "ends": [f"{edge:.2f}" for edge in scale],
        "chance": None
        if chance is None
        else {"value": f"{chance:.2f}", "at": _at(chance, scale)},
        "verdict": _verdict(
            outcome, more_is_better, history.final.get("eval", {}).get("paired")
        ),
        "n": outcome[-1].n,
        "source": source,
    }


def _source(history: History) -> str:
    """Returns a description of the evaluations before and after."""
    before, after = history.ends
    first = "the base model, before the first step"
    if history.config.get("adapter"):
        first = "the adapter that the run continues, before the first step"
    if before["step"]:
        first = f"the evaluation at step {before['step']}"
    if "final" not in after:
        return (
            f"Before: {first}. After: the evaluation at step {after['step']}. Both on the "
            "examples that select the checkpoint: the result has not been evaluated."
        )
    text = f"Before: {first}. After: the adapter of step {after['step']}, which was exported."
    if "initial" in before:
        text += (
            " Both on the same examples, which were not used to select the checkpoint."
        )
    chosen = [record["eval"].get("n") for record in history.evals if record["step"] > 0]
    if len(chosen) > 1 and (last := chosen[-1]):
        few = ", too few to distinguish checkpoints: the selection is mostly chance" * (
            last < FEW
        )
        text += f" It was selected on {last} other examples{few}."
    if history.unreached_step is not None:
        text += f" It is plain LoRA: mechanisms act from step {history.unreached_step}."
    return text


def _range(
    label: str, score: EvaluationScore, scale: tuple[float, float]
) -> dict[str, Any]:
    row = {
        "label": label,
        "value": f"{score.value:.3f}",
        "at": _at(score.value, scale),
        "interval": None,
    }
    if score.low is None or score.high is None:
        return row
    width = f"{100 * (score.high - score.low) / (scale[1] - scale[0]):.1f}%"
    interval = f"{score.low:.3f} to {score.high:.3f}"
    return row | {"interval": interval, "low": _at(score.low, scale), "width": width}


def _at(value: float, scale: tuple[float, float]) -> str:
    return f"{100 * (value - scale[0]) / (scale[1] - scale[0]):.1f}%"


def _verdict(
    scores: Sequence[EvaluationScore],
    more_is_better: bool,
    paired: Mapping[str, Any] | None,
) -> str:
    """Returns one sentence about the difference, from paired items if the last evaluation has them.

    Args:
      scores: before and after, or one of them.
      more_is_better: True if a higher metric is better.
      paired: the values of `nalora_jax.evaluate.statistics.compare`, or None.
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
    first, second = scores
    if (
        first.low is None
        or first.high is None
        or second.low is None
        or second.high is None
    ):
        return f"{change}."
    apart = first.high < second.low or second.high < first.low
    if apart:
        overlap = "do not overlap"
    else:
        overlap = "overlap: more items are needed for a conclusion"
    return f"{change}; the intervals {overlap}."


def tiles(history: History) -> Iterator[tuple[str, str, str]]:
    """Yields (name, value, note) of the small boxes at the top."""
    ends = [record["eval"] for record in history.ends]
    losses = [values["loss"] for values in ends if values.get("loss") is not None]
    if len(losses) > 1:
        change = f"{losses[0]:.3f} → {losses[-1]:.3f}"
        yield "Held-out loss", change, "before → after, lower is better"
    speed = history.column("tokens_per_second")[1]
    if np.isfinite(speed).any():
        tokens = history.total("tokens")
        note = f"; {tokens:,.0f} tokens" if tokens else ""
        yield "Tokens per second", f"{np.nanmedian(speed):,.0f}", f"median{note}"
    yield from _costs(history)


def _costs(history: History) -> Iterator[tuple[str, str, str]]:
    """Yields wall time by stage, and peak memory."""
    seconds = history.done.get("seconds") or {}
    stages = {name: value for name, value in seconds.items() if value is not None}
    if stages:
        if history.resumed:
            since = f" (since step {history.resumed[-1]})"
        else:
            since = ""
        parts = ", ".join(f"{name} {duration(value)}" for name, value in stages.items())
        yield f"Wall time{since}", duration(sum(stages.values())), parts
    device = history.last("peak_device_memory")
    host = history.last("peak_memory")
    if device:
        also = f"; {_size(host)} of the host" if host else ""
        yield "Peak memory", _size(device), f"of the fullest device{also}"
    elif host:
        yield "Peak memory", _size(host), "of the process, until the last log step"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


# ---------------------------------------------------------------- samples


def samples(history: History) -> list[dict[str, Any]]:
    """Returns samples of the first evaluation with any, paired with the last one's by prompt.

    Of paired multiple choice there are `SHOWN`, in the proportions of `_changes`.
    """
    sampled = [record for record in history.measured if record["eval"].get("samples")]
    if not sampled:
        return []
    last = {str(sample["prompt"]): sample for sample in sampled[-1]["eval"]["samples"]}
    pairs = []
    for sample in sampled[0]["eval"]["samples"]:
        answers = [("before", sample)]
        if len(sampled) > 1 and str(sample["prompt"]) in last:
            answers.append(("after", last[str(sample["prompt"])]))
        pairs.append(answers)
    return [_sample_row(answers) for answers in _proportional(pairs, changes(history))]


def changes(history: History) -> dict[str, int]:
    """Returns the number of items by what training changed; {} without paired items."""
    values = history.final.get("eval", {})
    paired = values.get("paired") or {}
    accuracy = values.get("accuracy")
    n = values.get("n")
    gained = paired.get("gained")
    lost = paired.get("lost")
    if not (
        isinstance(accuracy, float)
        and all(isinstance(count, int) for count in (n, gained, lost))
    ):
        return {}  # no multiple choice
    right = round(accuracy * n) - gained  # both times
    return {
        "gained": gained,
        "lost": lost,
        "right both times": right,
        _WRONG: n - right - gained - lost,
    }


def _proportional(
    pairs: list[list[Any]], changes: Mapping[str, int]
) -> list[list[Any]]:
    """Returns samples such that the shares of ``changes`` among them are about those of all
    items."""
    if not changes:
        return pairs[:SHOWN]
    kinds: dict[str, list[list[Any]]] = {name: [] for name in changes}
    for answers in pairs:
        first, last = (bool(answers[end][1].get("correct")) for end in (0, -1))
        kinds[_CHANGES[first, last]].append(answers)
    total = sum(changes.values())
    counts = {name: SHOWN * count // total for name, count in changes.items()}
    by_remainder = sorted(changes, key=lambda name: -(SHOWN * changes[name] % total))
    for name in by_remainder[: SHOWN - sum(counts.values())]:
        counts[name] += 1
    return [answers for name in changes for answers in kinds[name][: counts[name]]]


def _sample_row(answers: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    sample = answers[0][1]
    prompt = str(sample["prompt"])
    said = [
        (label, _clip(a.get("answer")), a.get("correct"), _end(a))
        for label, a in answers
    ]
    return {
        "prompt": _ends(prompt),
        "full": ""
        if _ends(prompt) == prompt or _turns(sample)
        else prompt[:_LONGEST_PROMPT],
        "image": picture(sample),
        "expected": _clip(sample["expected"])
        if sample.get("expected") is not None
        else None,
        "turns": _turns(sample),
        "answers": said,
    }


def sampled_after(history: History) -> int | None:
    """Returns the step of the adapter whose samples are shown with the base's, or None."""
    sampled = [record for record in history.measured if record["eval"].get("samples")]
    if len(sampled) > 1 and sampled[0]["step"] == 0:
        return int(sampled[-1]["step"])
    return None


def _turns(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the conversation before a completion as (role, text), if logged."""
    turns = sample.get("turns") or []
    return [
        (str(turn["role"]), _ends(str(turn["text"])))
        for turn in turns
        if {"role", "text"} <= turn.keys()
    ]


def read_rollouts(folder: Path) -> list[dict[str, Any]]:
    """Returns samples of at most `SHOWN` logged steps of a run with rewards, evenly spaced with the
    last one.

    Each step has ``step`` and ``samples`` with ``prompt``, ``completion`` and ``rewards``, pairs of
    texts.

    Raises:
      NaloraError: the file is damaged.
    """
    path = folder / ROLLOUTS
    if not path.is_file():
        return []
    steps: dict[int, list[dict[str, Any]]] = {}
    try:
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            rewards = {
                n: "none" if v is None else f"{v:.3g}"
                for n, v in record["rewards"].items()
            }
            sample = {
                "prompt": _ends(str(record["prompt"])),
                "completion": _clip(record["completion"]),
            }
            steps.setdefault(int(record["step"]), []).append(
                sample | {"rewards": list(rewards.items())}
            )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        remedy = "delete it: the report then has no samples of rollouts"
        raise NaloraError(
            str(path), expected="samples by step", found=error, remedy=remedy
        ) from error
    numbers = sorted(steps)
    shown = {
        numbers[round(i)]
        for i in np.linspace(0, len(numbers) - 1, min(SHOWN, len(numbers)))
    }
    return [{"step": step, "samples": steps[step]} for step in sorted(shown)]


def _end(sample: Mapping[str, Any]) -> str:
    """Returns the reason why a completion ended, or "" if not logged."""
    if "cut" not in sample:
        return ""
    if sample["cut"]:
        return "did not stop: cut off at the evaluation's limit"
    return "stopped by itself"


def _ends(text: str) -> str:
    """Returns a text, with its middle left out if it is long."""
    left_out = len(text) - 2 * _PROMPT_ENDS
    if left_out <= 0:
        return text
    return f"{text[:_PROMPT_ENDS]} [… {left_out:,} characters …] {text[-_PROMPT_ENDS:]}"


def _clip(value: object) -> str:
    if value is None:
        return ""
    text = str(value)
    return text if len(text) <= LONGEST_SAMPLE else text[:LONGEST_SAMPLE] + " …"


# ---------------------------------------------------------------- image runs

_PICTURE = "data:image/png;base64,"


def picture(sample: Mapping[str, Any]) -> str:
    """Returns a sample's picture as a data URL, or "" for any other text from the log."""
    image = sample.get("image")
    if isinstance(image, str) and image.startswith(_PICTURE):
        return image
    return ""


def confusions(history: History) -> list[tuple[str, dict[str, Any]]]:
    """Returns the confusion matrices before and after training.

    Example: ``("before", {"classes": [...], "rows": ...})``.
    """
    rows = []
    for label, record in (("before", history.initial), ("after", history.final)):
        values = record.get("eval", {})
        names = values.get("classes")
        matrix = values.get("confusion")
        if names and matrix:
            rows.append(
                (
                    label,
                    {"classes": names, "rows": list(zip(names, matrix, strict=False))},
                )
            )
    return rows


def layer_labels(history: History, count: int) -> list[str]:
    """Returns the row names of per-layer tables: numbers, with the tower's name for two towers."""
    towers: Mapping[str, int] = next(
        (
            record["towers"]
            for record in reversed(history.steps)
            if record.get("towers")
        ),
        {},
    )
    labels = [f"{name} {i}" for name, rows in towers.items() for i in range(int(rows))]
    return labels if len(labels) == count else [str(i) for i in range(count)]


# ---------------------------------------------------------------- needle retrieval

NEEDLE_FILE = "needle.json"


def read_needle(folder: Path) -> list[dict[str, Any]]:
    """Returns the tables before and after training, for the page; empty without results.

    Each has ``title``, ``heads`` and ``rows`` of texts.

    Raises:
      NaloraError: the file is damaged.
    """
    path = folder / NEEDLE_FILE
    if not path.is_file():
        return []
    try:
        grids = json.loads(path.read_text(encoding="utf-8"))
        return [_needle_table(name, grids[name]) for name in ("before", "after")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = "delete it, or run nalora eval --needle again"
        expected = "results of nalora eval --needle"
        raise NaloraError(
            str(path), expected=expected, found=error, remedy=remedy
        ) from error


def _needle_table(name: str, grid: Mapping[str, Any]) -> dict[str, Any]:
    interval = (
        f"95% interval {grid['low']:.3f} to {grid['high']:.3f}, {grid['n']} questions"
    )
    heads, rows = needle_cells(grid)
    title = (
        f"{name.capitalize()}: {grid['accuracy']:.3f} ({interval}), by length and depth"
    )
    return {"title": title, "heads": heads, "rows": rows}


def needle_cells(grid: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns heads and rows of the table of `nalora_jax.evaluate.needle.needle_summary`."""
    heads = ["tokens", *(f"{depth}%" for depth in grid["depths"]), "all"]
    rows = [
        [
            f"{row['length']:,}",
            *(f"{cell:.2f}" for cell in (*row["cells"], row["accuracy"])),
        ]
        for row in grid["rows"]
    ]
    return heads, rows
