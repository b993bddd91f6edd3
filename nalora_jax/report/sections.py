"""The content of a report's sections: headline metric, tiles, samples, images, needle retrieval."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
# characters at both ends of a long prompt; the page unfolds the middle
_PROMPT_ENDS = 320

# errors of reading a damaged line of samples
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
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
    edges = [chance]
    for score in outcome:
        edges += [score.low, score.value, score.high]
    edges = [edge for edge in edges if edge is not None]
    low = min(edges)
    high = max(edges)
    pad = 0.08 * (high - low) or 1.0  # room at both ends; 1 if all values are equal
    scale = (low - pad, high + pad)
    labels = [f"step {outcome[0].step}"]
    source = ""
    if len(outcome) == 2:
        labels = ["before", "after"]
        source = _source(history)
    rows = []
    for label, score in zip(labels, outcome, strict=True):
        rows.append(_interval_row(label, score, scale))
    shown_chance = None
    if chance is not None:
        shown_chance = {"value": f"{chance:.2f}", "at": _position(chance, scale)}
    paired = history.final.get("eval", {}).get("paired")
    return {
        "name": name,
        "rows": rows,
        "ends": [f"{edge:.2f}" for edge in scale],
        "chance": shown_chance,
        "verdict": _verdict(outcome, more_is_better, paired),
        "n": outcome[-1].n,
        "source": source,
    }


def _source(history: History) -> str:
    """Returns sentences on the evaluations before and after training.

    They say which adapters were evaluated, and on which examples.
    """
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
    selecting = [record for record in history.evals if record["step"] > 0]
    count = None
    if len(selecting) > 1:
        count = selecting[-1]["eval"].get("n")
    if count:
        text += f" It was selected on {count} other examples"
        if count < FEW:
            text += (
                ", too few to distinguish checkpoints: the selection is mostly chance"
            )
        text += "."
    if history.unreached_step is not None:
        text += f" It is plain LoRA: mechanisms act from step {history.unreached_step}."
    elif history.acting_steps is not None:
        acted, steps = history.acting_steps
        text += f" Mechanisms acted in {acted} of its {steps} steps."
    return text


def _interval_row(
    label: str, score: EvaluationScore, scale: tuple[float, float]
) -> dict[str, Any]:
    """Returns a score as text, with the places of its dot and its interval on the scale."""
    row = {
        "label": label,
        "value": f"{score.value:.3f}",
        "at": _position(score.value, scale),
        "interval": None,
    }
    if score.low is None or score.high is None:
        return row
    first, last = scale
    width = 100 * (score.high - score.low) / (last - first)
    row["interval"] = f"{score.low:.3f} to {score.high:.3f}"
    row["low"] = _position(score.low, scale)
    row["width"] = f"{width:.1f}%"
    return row


def _position(value: float, scale: tuple[float, float]) -> str:
    """Returns the position of a value on the scale, as a CSS percentage."""
    first, last = scale
    percent = 100 * (value - first) / (last - first)
    return f"{percent:.1f}%"


def _verdict(
    scores: Sequence[EvaluationScore],
    more_is_better: bool,
    paired: Mapping[str, Any] | None,
) -> str:
    """Returns one sentence about the difference, from paired items if the last evaluation has them.

    Args:
      scores: before and after, or one of them.
      more_is_better: True if a higher metric is better.
      paired: the values of `nalora_jax.evaluate.intervals.compare`, or None.
    """
    if len(scores) < 2:
        return ""
    gain = scores[1].value - scores[0].value
    if gain == 0:
        return "No change."
    better = (gain > 0) == more_is_better
    change = f"{gain:+.3f}, worse"
    if better:
        change = f"{gain:+.3f}, better"
    if paired:
        interval = f"{paired['low']:+.3f} to {paired['high']:+.3f}"
        counts = f"{paired['gained']} gained, {paired['lost']} lost"
        p_value = f"p = {paired['p_value']:.2g}"
        change += f" (95% of the difference, item by item: {interval}; "
        return f"{change}{counts}, {p_value})."
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
    """Yields (name, value, note) of the tiles below the headline: loss, speed, time and memory."""
    ends = [record["eval"] for record in history.ends]
    losses = [values["loss"] for values in ends if values.get("loss") is not None]
    if len(losses) > 1:
        before = losses[0]
        after = losses[-1]
        change = f"{before:.3f} → {after:.3f}"
        yield "Held-out loss", change, "before → after, lower is better"
    rates = history.program_rate()[1]
    if np.isfinite(rates).any():
        note = "median"
        if max(history.program_sizes, default=1) > 1:
            note += f", {describe_program(history.program_sizes)}"
        tokens = history.total("tokens")
        if tokens:
            note += f"; {tokens:,.0f} tokens"
        yield "Tokens per second", f"{np.nanmedian(rates):,.0f}", note
    yield from _costs(history)


def describe_program(sizes: Sequence[int]) -> str:
    """Returns a phrase with the numbers of runs in the compiled programs.

    Example:
      >>> describe_program([3]), describe_program([6, 1])
      ('in a program of 3 runs', 'in programs of 6 and 1 runs')
    """
    numbers = " and ".join(map(str, sizes))
    if len(sizes) > 1:
        return f"in programs of {numbers} runs"
    if sizes[0] == 1:
        return "in a program of 1 run"
    return f"in a program of {numbers} runs"


def _costs(history: History) -> Iterator[tuple[str, str, str]]:
    """Yields wall time by stage, and peak memory."""
    seconds = history.done.get("seconds") or {}
    stages = {name: value for name, value in seconds.items() if value is not None}
    if stages:
        if history.resumed:
            since = f" (since step {history.resumed[-1]})"
        else:
            since = ""
        parts = []
        for name, value in stages.items():
            parts.append(f"{name} {duration(value)}")
        total = duration(sum(stages.values()))
        yield f"Wall time{since}", total, ", ".join(parts)
    device = history.last("peak_device_memory")
    host = history.last("peak_memory")
    if device:
        note = "of the fullest device"
        if host:
            note += f"; {_size(host)} of the host"
        yield "Peak memory", _size(device), note
    elif host:
        yield "Peak memory", _size(host), "of the process, until the last log step"


def _size(count: float) -> str:
    """Returns a number of bytes in MB or GB."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB"


# ---------------------------------------------------------------- samples


def samples(history: History) -> list[dict[str, Any]]:
    """Returns samples of the first evaluation with any, paired with the last one's by prompt.

    There are up to `SHOWN`; of paired multiple choice in the proportions of `changes`.
    """
    sampled = [record for record in history.measured if record["eval"].get("samples")]
    if not sampled:
        return []
    after = {}
    if len(sampled) > 1:
        for sample in sampled[-1]["eval"]["samples"]:
            prompt = str(sample["prompt"])
            after[prompt] = sample
    pairs = []
    for sample in sampled[0]["eval"]["samples"]:
        answers = [("before", sample)]
        prompt = str(sample["prompt"])
        if prompt in after:
            answers.append(("after", after[prompt]))
        pairs.append(answers)
    selected = _select_samples(pairs, changes(history))
    return [_sample_row(answers) for answers in selected]


def changes(history: History) -> dict[str, int]:
    """Returns the number of gained, lost, right and wrong items; {} without paired items."""
    values = history.final.get("eval", {})
    paired = values.get("paired") or {}
    accuracy = values.get("accuracy")
    n = values.get("n")
    gained = paired.get("gained")
    lost = paired.get("lost")
    counted = all(isinstance(count, int) for count in (n, gained, lost))
    if not counted or not isinstance(accuracy, float):
        return {}  # no multiple choice
    right = round(accuracy * n) - gained  # both times
    return {
        "gained": gained,
        "lost": lost,
        "right both times": right,
        _WRONG: n - right - gained - lost,
    }


def _select_samples(
    pairs: list[list[Any]], changes: Mapping[str, int]
) -> list[list[Any]]:
    """Returns `SHOWN` samples in which the changes have about the same shares as in all items.

    Args:
      pairs: of each sample its (label, answer) before and after.
      changes: numbers of all items by kind of change; without any, the first samples are returned.
    """
    if not changes:
        return pairs[:SHOWN]
    kinds = defaultdict[str, list[list[Any]]](list)
    for answers in pairs:
        was_right = bool(answers[0][1].get("correct"))
        is_right = bool(answers[-1][1].get("correct"))
        kinds[_CHANGES[was_right, is_right]].append(answers)
    total = sum(changes.values())
    counts = {}
    remainders = {}
    for name, count in changes.items():
        counts[name] = SHOWN * count // total
        remainders[name] = SHOWN * count % total
    # Rounding down leaves some samples, which go to the kinds with the largest remainders.
    left = SHOWN - sum(counts.values())
    for name in sorted(changes, key=remainders.__getitem__, reverse=True)[:left]:
        counts[name] += 1
    selected = []
    for name in changes:
        selected += kinds[name][: counts[name]]
    return selected


def _sample_row(answers: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Returns the texts of a sample: its prompt, and the completions before and after."""
    sample = answers[0][1]
    prompt = str(sample["prompt"])
    turns = _turns(sample)
    shortened = _without_middle(prompt)
    full = ""
    if shortened != prompt and not turns:
        full = prompt[:_LONGEST_PROMPT]
    expected = sample.get("expected")
    if expected is not None:
        expected = _clip(expected)
    completions = []
    for label, answer in answers:
        text = _clip(answer.get("answer"))
        completions.append((label, text, answer.get("correct"), _stop_reason(answer)))
    return {
        "prompt": shortened,
        "full": full,
        "image": picture(sample),
        "expected": expected,
        "turns": turns,
        "answers": completions,
    }


def shown_sample_step(history: History) -> int | None:
    """Returns the step of the adapter whose samples are shown with the base's, or None."""
    sampled = [record for record in history.measured if record["eval"].get("samples")]
    if len(sampled) > 1 and sampled[0]["step"] == 0:
        return int(sampled[-1]["step"])
    return None


def _turns(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the conversation before a completion as (role, text), if logged."""
    turns = []
    for turn in sample.get("turns") or []:
        if {"role", "text"} <= turn.keys():
            text = _without_middle(str(turn["text"]))
            turns.append((str(turn["role"]), text))
    return turns


class Rollouts(NamedTuple):
    """Groups of samples of a run with rewards, as the page shows them.

    Attributes:
      steps: each with ``step`` and ``groups``; a group has ``prompt`` and ``samples``, and a sample
        ``completion``, ``rewards`` (pairs of texts) and ``advantage`` ("" if not logged).
      unreadable: number of damaged lines, which are left out.
    """

    steps: list[dict[str, Any]]
    unreadable: int


def read_rollouts(folder: Path) -> Rollouts:
    """Returns the groups of at most `SHOWN` logged steps, evenly spaced, with the last one.

    Raises:
      NaloraError: the file cannot be read.
    """
    path = folder / ROLLOUTS
    if not path.is_file():
        return Rollouts([], 0)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise NaloraError(
            str(path),
            expected="samples by step",
            found=error,
            remedy="delete it: the report then has no samples of rollouts",
        ) from error
    groups: dict[int, list[dict[str, Any]]] = {}
    unreadable = 0
    for line in lines:
        try:
            record = json.loads(line)
            step = int(record["step"])
            group = _sample_group(record)
        except _DAMAGE:
            unreadable += 1
        else:
            groups.setdefault(step, []).append(group)
    steps = sorted(groups)
    count = min(SHOWN, len(steps))
    spaced = np.linspace(0, len(steps) - 1, count)
    shown = []
    for step in sorted({steps[round(index)] for index in spaced}):
        shown.append({"step": step, "groups": groups[step]})
    return Rollouts(shown, unreadable)


def _sample_group(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the texts of a line of rollouts: its prompt and samples.

    A line of an earlier version has a single sample, without a list.
    """
    samples = []
    for sample in record.get("samples", [record]):
        rewards = []
        for name, reward in sample["rewards"].items():
            value = "none"
            if reward is not None:
                value = f"{reward:.3g}"
            rewards.append((name, value))
        advantage = ""
        if sample.get("advantage") is not None:
            advantage = f"{sample['advantage']:+.3f}"
        completion = _clip(sample["completion"])
        if "turns" in sample:  # with an environment
            turns = [f"{turn['author']}: {turn['text']}" for turn in sample["turns"]]
            completion = _clip("\n".join(turns))
        samples.append(
            {
                "completion": completion,
                "rewards": rewards,
                "advantage": advantage,
            }
        )
    return {"prompt": _without_middle(str(record["prompt"])), "samples": samples}


def _stop_reason(sample: Mapping[str, Any]) -> str:
    """Returns the reason why a completion ended, or "" if not logged."""
    if "cut" not in sample:
        return ""
    if sample["cut"]:
        return "did not stop: cut off at the evaluation's limit"
    return "stopped by itself"


def _without_middle(text: str) -> str:
    """Returns a text, with its middle left out if it is long."""
    left_out = len(text) - 2 * _PROMPT_ENDS
    if left_out <= 0:
        return text
    first = text[:_PROMPT_ENDS]
    last = text[-_PROMPT_ENDS:]
    return f"{first} [… {left_out:,} characters …] {last}"


def _clip(value: object) -> str:
    """Returns the first characters of a text; "" for None."""
    if value is None:
        return ""
    text = str(value)
    if len(text) > LONGEST_SAMPLE:
        text = text[:LONGEST_SAMPLE] + " …"
    return text


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
            named = list(zip(names, matrix, strict=False))
            rows.append((label, {"classes": names, "rows": named}))
    return rows


def layer_labels(history: History, count: int) -> list[str]:
    """Returns the row names of per-layer tables: numbers, with the tower's name for two towers."""
    labels = []
    for record in reversed(history.steps):
        towers = record.get("towers")
        if towers:
            for name, layers in towers.items():
                for layer in range(int(layers)):
                    labels.append(f"{name} {layer}")
            break
    if len(labels) != count:
        return [str(layer) for layer in range(count)]
    return labels


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
        raise NaloraError(
            str(path),
            expected="results of nalora eval --needle",
            found=error,
            remedy="delete it, or run nalora eval --needle again",
        ) from error


def _needle_table(name: str, grid: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the table of one needle evaluation: ``title``, ``heads`` and ``rows``.

    The title has the overall accuracy with its interval.
    """
    heads, rows = needle_cells(grid)
    accuracy = f"{grid['accuracy']:.3f}"
    interval = f"95% interval {grid['low']:.3f} to {grid['high']:.3f}"
    counted = f"{interval}, {grid['n']} questions"
    title = f"{name.capitalize()}: {accuracy} ({counted}), by length and depth"
    return {
        "title": title,
        "heads": heads,
        "rows": rows,
    }


def needle_cells(grid: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns heads and rows of the table of `nalora_jax.evaluate.needle.needle_summary`."""
    heads = ["tokens", *(f"{depth}%" for depth in grid["depths"]), "all"]
    rows = []
    for row in grid["rows"]:
        accuracies = [*row["cells"], row["accuracy"]]
        cells = [f"{accuracy:.2f}" for accuracy in accuracies]
        length = f"{row['length']:,}"
        rows.append([length, *cells])
    return heads, rows
