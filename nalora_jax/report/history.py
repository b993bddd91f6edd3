"""A run's log as arrays, the input of the report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.common.redaction import redact
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.run_log import METRICS_FILE, acting_steps, read_metrics

REGIONS = ("inverted", "contracting", "expanding", "linear")
# Headline metrics by preference: key in an evaluation, its name, and True if more is better.
METRICS = (
    ("accuracy", "accuracy", True),
    ("reward", "reward", True),
    ("recall", "recall at 1", True),
    ("spearman_cosine", "Spearman correlation", True),
    ("exact_match", "exact match", True),
    ("loss", "held-out loss", False),
)


@dataclass(frozen=True)
class EvaluationScore:
    """The headline metric of one evaluation."""

    step: int
    value: float
    low: float | None  # of the 95% interval, if logged
    high: float | None
    n: int | None  # number of items


@dataclass(frozen=True)
class Histograms:
    """Distribution of a mechanism's multipliers over channels at the log steps.

    See `assembly.state_metrics`.
    """

    steps: np.ndarray  # [T]
    edges: np.ndarray  # [B], rising
    counts: np.ndarray  # [T, L, B + 1]: channels below, between and above the edges


@dataclass(frozen=True)
class History:
    """Lines of one metrics.jsonl, sorted by kind."""

    header: Mapping[str, Any]  # the line with "run", "versions" and "device", or empty
    steps: tuple[Mapping[str, Any], ...]  # log steps
    # during training, on the examples that select the checkpoint
    evals: tuple[Mapping[str, Any], ...]
    # evaluation of the base, on the same examples as `final`, or empty
    initial: Mapping[str, Any]
    # evaluation of the exported adapter (the best step), or empty
    final: Mapping[str, Any]
    resumed: tuple[int, ...]  # steps from which the run was resumed
    done: Mapping[str, Any]  # how the run ended; empty while it is running
    # (steps done before, runs in the compiled program) of each start and resumption
    programs: tuple[tuple[int, int], ...] = ()

    @property
    def config(self) -> Mapping[str, Any]:
        """Returns the run's config as nested dicts, without passwords (earlier logs have them)."""
        return redact(self.header.get("run", {}))

    @property
    def loss_kind(self) -> str:
        """Returns "policy_loss" for a log with rewards of samples, "preference_loss" for one with
        those of pairs, "divergence" for one with a teacher, else "loss"."""
        names: set[str] = set()
        for record in self.steps:
            names |= record.keys()
        if "reward" in names:
            return "policy_loss"
        if "rewards_margin" in names:
            return "preference_loss"
        if "agreement" in names:
            return "divergence"
        return "loss"

    @property
    def total_steps(self) -> int:
        """Returns the run's planned steps, or the last logged step if the config is unknown."""
        return int(self.config.get("steps", self.last_step))

    @property
    def last_step(self) -> int:
        """Returns the last step in the log."""
        records = [*self.steps, *self.evals]
        return max((int(record["step"]) for record in records), default=0)

    @property
    def exported_step(self) -> int | None:
        """Returns the step of the exported adapter; None before it is evaluated."""
        if not self.final:
            return None
        return int(self.final["step"])

    @property
    def acting_steps(self) -> tuple[int, int] | None:
        """Returns in how many steps of the exported adapter mechanisms acted, and its steps.

        None without mechanisms, and before the adapter is evaluated.
        """
        if self.exported_step is None:
            return None
        return acting_steps(self.header.get("mechanisms_from"), self.exported_step)

    @property
    def unreached_step(self) -> int | None:
        """Returns the first step in which mechanisms act if the adapter was exported before it.

        Otherwise it is None.
        """
        if self.acting_steps is None or self.acting_steps[0] > 0:
            return None
        return int(self.header["mechanisms_from"])

    @property
    def program_sizes(self) -> tuple[int, ...]:
        """Returns the different numbers of runs that the run's compiled programs trained."""
        return tuple(dict.fromkeys(runs for _, runs in self.programs))

    def program_rate(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (steps [T], tokens per second [T]) of the compiled program at the log steps.

        The program of a sweep trains several runs with batches of one shape; its rate is the run's
        times their number.
        """
        steps, rates = self.column("tokens_per_second")
        runs = np.ones(len(steps))
        for start, count in self.programs:
            runs[steps > start] = count
        return steps, rates * runs

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (steps [T], values [T]) of a scalar of the log steps.

        null becomes NaN; lines without the scalar are left out.
        """
        rows = []
        for record in self.steps:
            if name in record:
                rows.append((record["step"], record[name]))
        return _columns(rows)

    def layers(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (steps [T], values [T, L] or [T, L, 4]) of a layer metric; null becomes NaN."""
        rows = []
        for record in self.steps:
            values = (record.get("layers") or {}).get(name)
            if values is not None:
                rows.append((record["step"], values))
        return _columns(rows)

    @property
    def mechanisms(self) -> list[str]:
        """Returns the labels of the mechanisms with histograms in the last log steps."""
        for record in reversed(self.steps):
            if record.get("histograms"):
                return list(record["histograms"])
        return []

    def histograms(self, label: str) -> Histograms | None:
        """Returns a mechanism's histograms, or None without any.

        Log steps with other bins than the last one are left out.
        """
        rows = []
        for record in self.steps:
            logged = (record.get("histograms") or {}).get(label)
            if logged:
                counts = np.array(logged["counts"], float)
                rows.append((record["step"], logged["edges"], counts))
        if not rows:
            return None
        _, edges, last = rows[-1]
        steps = []
        tables = []
        for step, bins, counts in rows:
            if bins == edges and counts.shape == last.shape:
                steps.append(step)
                tables.append(counts)
        return Histograms(
            np.array(steps, float), np.array(edges, float), np.stack(tables)
        )

    def adapters(
        self, name: str = "adapters"
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Returns (steps [T], values [T, L]) by adapter path; ``name`` selects norms or ``ranks``.

        null becomes NaN. Lines with another number of layers than the last one are left out.
        """
        curves: dict[str, list[tuple[float, list[float | None]]]] = {}
        for record in self.steps:
            for path, norms in (record.get(name) or {}).items():
                if norms is None or any(isinstance(norm, list) for norm in norms):
                    continue
                curves.setdefault(path, []).append((record["step"], norms))
        columns = {}
        for path, rows in curves.items():
            layers = len(rows[-1][1])
            alike = [row for row in rows if len(row[1]) == layers]
            columns[path] = _columns(alike)
        return columns

    def last(self, name: str) -> float | None:
        """Returns a scalar of the last log step that has it."""
        for record in reversed(self.steps):
            if record.get(name) is not None:
                return float(record[name])
        return None

    def eval_column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (steps [E], values [E]) of a scalar of the evaluations."""
        rows = []
        for record in self.evals:
            values = record["eval"]
            if name in values:
                rows.append((record["step"], values[name]))
        return _columns(rows)

    @property
    def metric(self) -> tuple[str, str, bool] | None:
        """Returns the evaluations' headline metric (key, name, more is better), or None."""
        evaluations = [record["eval"] for record in self.measured]
        for metric in METRICS:
            key = metric[0]
            if any(values.get(key) is not None for values in evaluations):
                return metric
        return None

    @property
    def scores(self) -> list[EvaluationScore]:
        """Returns the headline metric of every evaluation during training, by step."""
        return self._scores(self.evals)

    @property
    def ends(self) -> tuple[Mapping[str, Any], ...]:
        """Returns the evaluations before and after training, or one of them if only one is known.

        Both use the examples of the reported results. Until the result is evaluated, they are the
        first and the last evaluation during training, on the examples that choose the checkpoint.
        """
        if self.initial and self.final:
            return self.initial, self.final
        if self.initial and len(self.evals) < 2:
            return (self.initial,)
        along = tuple(filter(None, (*self.evals, self.final)))
        if len(along) < 2:
            return along
        return along[0], along[-1]

    @property
    def outcome(self) -> list[EvaluationScore]:
        """Returns the headline metric of `ends`."""
        return self._scores(self.ends)

    @property
    def measured(self) -> tuple[Mapping[str, Any], ...]:
        """Returns every evaluation, with the result's last."""
        return tuple(filter(None, (self.initial, *self.evals, self.final)))

    def _scores(self, records: Sequence[Mapping[str, Any]]) -> list[EvaluationScore]:
        """Returns the headline metric of each evaluation that has it, in order of ``records``.

        It is empty if the run has no headline metric.
        """
        if self.metric is None:
            return []
        key = self.metric[0]
        scores = []
        for record in records:
            values = record["eval"]
            if values.get(key) is None:
                continue
            score = EvaluationScore(
                step=int(record["step"]),
                value=float(values[key]),
                # the interval of the headline metric
                low=values.get("low"),
                high=values.get("high"),
                n=values.get("n"),
            )
            scores.append(score)
        return scores

    def total(self, name: str) -> float:
        """Returns the sum of a counter that each log step restarts (seconds, tokens), or 0."""
        return float(np.nansum(self.column(name)[1]))


def read_history(folder: str | Path) -> History:
    """Returns the history of the run in ``folder``.

    Raises:
      NaloraError: metrics.jsonl is missing, damaged, or has no line of a run.
    """
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        _refuse_folder_of_runs(Path(folder))
    history = history_of(read_metrics(path))
    if not history.header and not history.steps and not history.measured:
        raise NaloraError(
            str(path),
            expected="the lines of a run",
            found="none",
            remedy="train first",
        )
    _check_layers(history, path)
    return history


def _refuse_folder_of_runs(folder: Path) -> None:
    """Raises a NaloraError that names the runs below a folder, if there are any."""
    logs = folder.glob(f"*/{METRICS_FILE}")
    runs = sorted(str(log.parent) for log in logs)
    if not runs:
        return
    found = f"a folder of {len(runs)} runs"
    if len(runs) == 1:
        found = "a folder of 1 run"
    listed = shlex.join(runs[:2])
    if len(runs) > 2:
        listed += " ..."
    raise NaloraError(
        str(folder),
        expected="the folder of a run",
        found=found,
        remedy=f"give one of them, or several to compare: nalora report {listed}",
    )


def _check_layers(history: History, path: Path) -> None:
    """Raises a NaloraError unless every per-layer metric has the same shape in all lines.

    All metrics must have the same number of layers.
    """
    shapes: dict[str, tuple[int, ...]] = {}  # (layers,) or (layers, numbers of each)
    for record in history.steps:
        for name, rows in (record.get("layers") or {}).items():
            if rows is None:
                continue
            shape: tuple[int, ...] = (len(rows),)
            if isinstance(rows[0], list):
                shape = (len(rows), len(rows[0]))
            if shapes.setdefault(name, shape) != shape:
                place = f"{path}: step {record['step']}: layers: {name}"
                raise NaloraError(
                    place,
                    expected=f"the shape of the lines before it, {shapes[name]}",
                    found=shape,
                    remedy="the file was edited, or is of two runs",
                )
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise NaloraError(
            f"{path}: layers", expected="as many layers for every number", found=shapes
        )


def history_of(records: Sequence[Mapping[str, Any]]) -> History:
    """Returns the history of a log's records, sorted by kind; unknown kinds are ignored.

    Of several headers or initial evaluations the first counts, of final ones the last.
    """
    header: Mapping[str, Any] = {}
    initial: Mapping[str, Any] = {}
    final: Mapping[str, Any] = {}
    done: Mapping[str, Any] = {}
    steps = []
    evals = []
    resumed = []
    programs = []
    for record in records:
        if "run" in record:
            header = header or record
            programs.append((0, record.get("runs_in_program") or 1))
        if "resumed" in record:
            step = record["resumed"]["step"]
            resumed.append(step)
            programs.append((step, record["resumed"].get("runs_in_program") or 1))
        if "done" in record:
            done = record["done"]
        if "eval" not in record:
            if "step" in record:
                steps.append(record)
        elif "initial" in record:
            initial = initial or record
        elif "final" in record:
            final = record
        elif "step" in record:
            evals.append(record)
    return History(
        header=header,
        steps=tuple(steps),
        evals=tuple(evals),
        initial=initial,
        final=final,
        resumed=tuple(resumed),
        done=done,
        programs=tuple(programs),
    )


def _columns(rows: Sequence[tuple[float, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns pairs of step and value as arrays: steps ``[T]`` and values ``[T, ...]``."""
    steps = np.array([step for step, _ in rows], float)
    values = np.array([value for _, value in rows], float)
    return steps, values
