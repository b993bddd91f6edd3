"""A run's log as arrays: what the report draws and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.errors import NaloraError
from nalora_jax.redaction import redacted
from nalora_jax.seals import unseal
from nalora_jax.tokenizer import read_json
from nalora_jax.train.metrics import FILE, read_metrics
from nalora_jax.train.records import check_evaluation

REGIONS = ("inverted", "contracting", "expanding", "linear")
# Headline metrics by preference: key in an evaluation, its name, and whether more is better.
METRICS = (
    ("accuracy", "accuracy", True),
    ("recall", "recall at 1", True),
    ("exact_match", "exact match", True),
    ("loss", "held-out loss", False),
)
# What logs of earlier versions call a number of every layer.
FORMER_NAMES = {"favoured": "responsive"}


@dataclass(frozen=True)
class EvaluationScore:
    """The headline metric of one evaluation."""

    step: int
    value: float
    low: float | None  # 95% interval, where the evaluation gave one
    high: float | None
    n: int | None  # items behind it


@dataclass(frozen=True)
class Histograms:
    """How a mechanism's factors were spread over channels at the log steps; see `train.state_metrics`."""

    steps: np.ndarray  # [T]
    edges: np.ndarray  # [B], rising
    counts: np.ndarray  # [T, L, B + 1]: channels below the first edge, between two, from the last one on


@dataclass(frozen=True)
class History:
    """The lines of one metrics.jsonl, sorted by what they are."""

    header: Mapping[str, Any]  # the line with "run", "versions" and "device"; empty if the log has none
    steps: tuple[Mapping[str, Any], ...]  # log steps
    evals: tuple[Mapping[str, Any], ...]  # evaluations along the way, on the examples that choose the checkpoint
    initial: Mapping[str, Any]  # evaluation of the base, on the same examples as `final`; empty if there is none
    final: Mapping[str, Any]  # evaluation of what was exported (the best step); empty if there is none
    resumed: tuple[int, ...]  # steps that the run was continued from
    done: Mapping[str, Any]  # how the run ended; empty while it is running

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's config as nested dicts, without passwords, which logs of earlier versions hold."""
        settings: Mapping[str, Any] = redacted(self.header.get("run", {}))
        return settings

    @property
    def total_steps(self) -> int:
        """Steps the run was to take, or the last one logged if the config is not known."""
        return int(self.config.get("steps", self.last_step))

    @property
    def last_step(self) -> int:
        """The last step that the log knows of."""
        return max((int(record["step"]) for record in (*self.steps, *self.evals)), default=0)

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps [T], values [T]) of one number of the log steps; null becomes NaN, lines without it are left out."""
        rows = [(record["step"], record[name]) for record in self.steps if name in record]
        return np.array([step for step, _ in rows], float), np.array([value for _, value in rows], float)

    def layers(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps [T], values [T, L] or [T, L, 4]) of one per-layer number; null becomes NaN."""
        if not any(_has(record, name) for record in self.steps):
            name = FORMER_NAMES.get(name, name)
        rows = [(record["step"], record["layers"][name]) for record in self.steps if _has(record, name)]
        return np.array([step for step, _ in rows], float), np.array([value for _, value in rows], float)

    @property
    def mechanisms(self) -> list[str]:
        """Labels of the mechanisms whose factors the last log steps count."""
        return list(next((r["histograms"] for r in reversed(self.steps) if r.get("histograms")), {}))

    def histograms(self, label: str) -> Histograms | None:
        """Those of one mechanism, as its last log step counts them; None where there are none."""
        found = [(r["step"], (r.get("histograms") or {}).get(label)) for r in self.steps]
        known = [(step, one["edges"], np.array(one["counts"], float)) for step, one in found if one]
        if not known:
            return None
        _, edges, last = known[-1]
        alike = [(step, counts) for step, bins, counts in known if bins == edges and counts.shape == last.shape]
        at, rows = (list(column) for column in zip(*alike, strict=True))
        return Histograms(np.array(at, float), np.array(edges, float), np.stack(rows))

    def adapters(self, name: str = "adapters") -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(steps [T], numbers [T, L]) of the adapters by path, their norms or their ``ranks``; null becomes NaN."""
        found: dict[str, list[tuple[float, list[float | None]]]] = {}
        for record in self.steps:
            for path, norms in (record.get(name) or {}).items():
                if norms is not None and not any(isinstance(norm, list) for norm in norms):
                    found.setdefault(path, []).append((record["step"], norms))
        alike = {path: [row for row in rows if len(row[1]) == len(rows[-1][1])] for path, rows in found.items()}
        return {
            path: (np.array([step for step, _ in rows], float), np.array([norms for _, norms in rows], float))
            for path, rows in alike.items()
        }

    def last(self, name: str) -> float | None:
        """A number of the last log step that has it."""
        return next((float(r[name]) for r in reversed(self.steps) if r.get(name) is not None), None)

    def eval_column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps [E], values [E]) of one number of the evaluations."""
        rows = [(record["step"], record["eval"][name]) for record in self.evals if name in record["eval"]]
        return np.array([step for step, _ in rows], float), np.array([value for _, value in rows], float)

    @property
    def metric(self) -> tuple[str, str, bool] | None:
        """The headline metric (key, name, more is better) that the evaluations have, or None."""
        return next((m for m in METRICS if any(e["eval"].get(m[0]) is not None for e in self.measured)), None)

    @property
    def scores(self) -> list[EvaluationScore]:
        """The headline metric of every evaluation along the way, by step."""
        return self._scores(self.evals)

    @property
    def ends(self) -> tuple[Mapping[str, Any], ...]:
        """The evaluations that before and after are taken from, of the same questions; one alone where one is known.

        They are of the base and of the result, on the questions that results are reported on; while the result is not
        measured, the first and the last along the way, on those that choose the checkpoint.
        """
        if self.initial and self.final:
            return self.initial, self.final
        if self.initial and len(self.evals) < 2:
            return (self.initial,)
        along = (*self.evals, *((self.final,) if self.final else ()))
        return (along[0], along[-1]) if len(along) > 1 else along

    @property
    def outcome(self) -> list[EvaluationScore]:
        """The headline metric of `ends`."""
        return self._scores(self.ends)

    @property
    def measured(self) -> tuple[Mapping[str, Any], ...]:
        """Every evaluation, that of the result last."""
        ends = ((self.initial,) if self.initial else (), (self.final,) if self.final else ())
        return (*ends[0], *self.evals, *ends[1])

    def _scores(self, records: Sequence[Mapping[str, Any]]) -> list[EvaluationScore]:
        if self.metric is None:
            return []
        key = self.metric[0]
        return [_score(record, key) for record in records if record["eval"].get(key) is not None]

    def total(self, name: str) -> float:
        """Sum of a number that counts since the last log step (seconds, tokens); 0 where there is none."""
        return float(np.nansum(self.column(name)[1]))


def read_history(folder: str | Path) -> History:
    """The history of the run in ``folder``.

    Raises:
      NaloraError: there is no metrics.jsonl, it is damaged, or it holds no line of a run.
    """
    path = Path(folder) / FILE
    history = history_of(read_metrics(path))
    if not history.header and not history.steps and not history.measured:
        raise NaloraError(str(path), expected="the lines of a run", found="none", remedy="train first")
    _check_layers(history, path)
    return history


def read_evaluation(path: Path) -> dict[str, Any]:
    """Returns the evaluation in a separate file (before.json).

    Raises:
      NaloraError: the file cannot be read, is no evaluation, or differs from its digest.
    """
    values = unseal(read_json(path), str(path))
    check_evaluation(values, str(path))
    return values


def _check_layers(history: History, path: Path) -> None:
    """Every per-layer number has one shape in all lines."""
    shapes: dict[str, tuple[int, ...]] = {}
    for record in history.steps:
        for name, rows in (record.get("layers") or {}).items():
            if rows is None:
                continue
            shape = (len(rows), len(rows[0])) if isinstance(rows[0], list) else (len(rows),)
            if shapes.setdefault(name, shape) != shape:
                raise NaloraError(
                    f"{path}: step {record['step']}: layers: {name}",
                    expected=f"the shape of the lines before it, {shapes[name]}",
                    found=shape,
                    remedy="the file was edited, or is of two runs",
                )
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise NaloraError(f"{path}: layers", expected="as many layers for every number", found=shapes)


def history_of(records: Sequence[Mapping[str, Any]]) -> History:
    """The records of a log, sorted by kind; unknown kinds are ignored."""
    return History(
        header=next((record for record in records if "run" in record), {}),
        steps=tuple(record for record in records if "step" in record and "eval" not in record),
        evals=tuple(r for r in records if {"step", "eval"} <= r.keys() and not {"initial", "final"} & r.keys()),
        initial=next((record for record in records if "eval" in record and "initial" in record), {}),
        final=next((record for record in reversed(records) if "eval" in record and "final" in record), {}),
        resumed=tuple(record["resumed"]["step"] for record in records if "resumed" in record),
        done=next((record["done"] for record in reversed(records) if "done" in record), {}),
    )


def _score(record: Mapping[str, Any], key: str) -> EvaluationScore:
    found = record["eval"]  # its low and high are the interval of the headline metric
    return EvaluationScore(int(record["step"]), float(found[key]), found.get("low"), found.get("high"), found.get("n"))


def _has(record: Mapping[str, Any], name: str) -> bool:
    return (record.get("layers") or {}).get(name) is not None
