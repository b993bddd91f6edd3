"""Callbacks that write a run's log, and send its numbers to TensorBoard, Weights & Biases or
MLflow.

`nalora_jax.evaluate.run_log` describes the log's lines and reads them. Each tracker imports its
library when it is used, so a run only needs the libraries that its settings name.
"""

from __future__ import annotations

import importlib
import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nalora_jax.common.digests import seal
from nalora_jax.common.files import name_file_in_errors, open_unlinked, write_atomically
from nalora_jax.config.structured import flatten_settings
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.run_log import METRICS_FILE, read_metrics, to_json
from nalora_jax.train.callbacks import Callback, Ended, Started, register_callback

log = logging.getLogger(__name__)


class MetricsLog(Callback, AbstractContextManager["MetricsLog"]):
    """The log ``folder/metrics.jsonl`` of a run; a context manager that closes the file.

    Args:
      folder: the run's folder; created if missing.
      resume: step of the restored checkpoint, or None for a new run. Lines of later steps are
        removed, because the resumed run writes them again. So is an incomplete last line after a
        crash.
      goes_on: False if no step follows, so that the line of a stopped run's last step stays.

    Attributes:
      begun: the line of the step where the resumed run was stopped, if its next log step includes
        those steps; else empty.

    Raises:
      NaloraError: a new run's folder contains a log, or the log to resume is damaged before its
        last line.
    """

    required: ClassVar[bool] = True

    def __init__(
        self, folder: str | Path, *, resume: int | None = None, goes_on: bool = True
    ) -> None:
        """Opens the log, without the lines that a resumed run writes again; see the class."""
        self.path = Path(folder) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume is None and self.path.exists():
            raise NaloraError(
                str(self.path),
                expected="a new run's folder",
                found="the log of another run",
                remedy="choose another --output, or continue that run with --resume",
            )
        self._resume = resume
        earlier: list[dict[str, Any]] = []
        self.begun: dict[str, Any] = {}
        self._lost: dict[str, int] = {}
        if resume is not None:
            earlier, self.begun = _rewind(self.path, resume, goes_on=goes_on)
            # Every checkpoint's step has a line, in the file or in `begun`. Without it, a kill lost
            # lines that the copy of the folder in a bucket had not yet received.
            last = max(map(_step, earlier), default=0)
            if last < resume and not self.begun:
                self._lost = {"lost_after": last}
                log.warning(
                    "%s: the lines of steps %d to %d are lost",
                    self.path,
                    last + 1,
                    resume,
                )
        self._has_header = any("run" in record for record in earlier)
        self._file = open_unlinked(self.path, "a", encoding="utf-8")

    def start(
        self,
        config: Mapping[str, Any],
        *,
        versions: Mapping[str, str],
        device: str,
        **more: Any,
    ) -> None:
        """Writes the first line of a new run (config, versions, device) or of a resumption."""
        machine = {"versions": dict(versions), "device": device}
        if self.begun:
            more["begun"] = self.begun
        more |= self._lost
        if self._has_header:
            self.write({"resumed": {"step": self._resume, **machine, **more}})
        else:
            self.write({"run": dict(config), **machine, **more})
            self._has_header = True

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line.

        Args:
          record: nested dicts and lists of numbers, strings, booleans, None,
            numpy scalars and arrays.

        Raises:
          NaloraError: the line cannot be written, e.g. because the disk is full.
        """
        line = json.dumps(seal(to_json(record)), allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            remedy = "free some space, then continue with --resume"
            raise NaloraError(
                str(self.path), expected="to append a line", found=error, remedy=remedy
            ) from error

    def on_start(self, started: Started) -> None:
        """Writes the first line, or the line of a resumed run."""
        extra = dict(started.more)
        if started.step:
            # The line of a resumed run has no settings unless they are named.
            extra["settings"] = started.config
        self.start(
            started.config,
            versions=started.versions,
            device=started.device,
            **extra,
        )

    def on_log(self, step: int, record: Mapping[str, Any]) -> None:
        """Writes the line of a log step."""
        self.write({"step": step, **record})

    def on_eval(self, step: int, values: Mapping[str, Any], kind: str) -> None:
        """Writes the line of an evaluation.

        Args:
          step: the evaluated step.
          values: the metrics; per-example ``right`` is only written during training.
          kind: "initial" (the base), "final" (the exported adapter), or "" during training.
        """
        logged = {
            name: value
            for name, value in values.items()
            if not (kind and name == "right")
        }
        record: dict[str, Any] = {"step": step}
        if kind:
            record[kind] = True
        self.write(record | {"eval": logged})

    def on_end(self, ended: Ended) -> None:
        """Writes the last line."""
        ending: dict[str, Any] = {"step": ended.step, "best_step": ended.best_step}
        if ended.message:
            ending = {"message": ended.message}
        if ended.seconds:
            ending["seconds"] = ended.seconds
        self.write({"done": ending})

    def close(self) -> None:
        """Closes the file; later calls have no effect."""
        with suppress(OSError):  # `write` has already raised if the disk is full
            self._file.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def _rewind(
    path: Path, step: int, *, goes_on: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Removes the lines after ``step`` from the file, and the line of the run's end.

    Returns the remaining lines, and `MetricsLog.begun`: the numbers of the line of ``step`` if the
    run was stopped between log steps, which is then removed as well. Without ``goes_on`` it stays.
    """
    if not path.exists():
        return [], {}
    records = read_metrics(path)
    # A run ends once: the resumed run writes these lines again.
    earlier = [
        r for r in records if _step(r) <= step and not {"done", "final"} & r.keys()
    ]
    begun: dict[str, Any] = {}
    if goes_on:
        for record in [r for r in earlier if _step(r) == step]:
            # Resumed at this step before, without a later line: that resumption has the numbers.
            begun = record.get("resumed", {}).get("begun", begun)
            # Only an incomplete record has this number (`nalora_jax.train.loop`).
            if "target_tokens" in record:
                begun = {
                    name: value
                    for name, value in record.items()
                    if isinstance(value, int | float)
                }
                earlier.remove(record)
    lines = [json.dumps(seal(record)) + "\n" for record in earlier]
    write_atomically(path, "".join(lines))
    return earlier, begun


def _step(record: Mapping[str, Any]) -> int:
    """Returns the step of a line or of a resumption; 0 for the first line."""
    return int(record.get("step", record.get("resumed", {}).get("step", 0)))


def scalars(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Returns tags and numbers of one line, for trackers; layers have one tag each.

    Example:
      >>> scalars({"step": 1, "loss": 2.0, "eval": {"n": 4}, "layers": {"limit": [0.2, None]}})
      [('train/loss', 2.0), ('eval/n', 4), ('limit/layer_00', 0.2)]
    """
    numbers = [
        (f"train/{name}", value) for name, value in record.items() if name != "step"
    ]
    numbers += [
        (f"eval/{name}", value) for name, value in record.get("eval", {}).items()
    ]
    for name, rows in record.get("layers", {}).items():
        numbers += [
            (f"{name}/layer_{index:02d}", row) for index, row in enumerate(rows)
        ]
    return [
        (tag, value)
        for tag, value in numbers
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


_RUN_ID = "nalora_run_id"  # file in a tracker's folder: id of its run, for resumption


class _Numbers(Callback):
    """Base of the trackers: tags every number, e.g. "train/loss" or "misalignment/layer_03"."""

    def on_log(self, step: int, record: Mapping[str, Any]) -> None:
        """Writes the numbers of a log step."""
        self.write(step, dict(scalars(to_json({"step": step, **record}))))

    def on_eval(self, step: int, values: Mapping[str, Any], kind: str) -> None:
        """Writes the numbers of an evaluation; base and result have separate tags."""
        numbers = scalars(to_json({"eval": values}))
        tag = {"initial": "before/", "final": "after/"}.get(kind, "eval/")
        self.write(
            step, {tag + name.removeprefix("eval/"): value for name, value in numbers}
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by tag."""
        raise NotImplementedError


@register_callback("tensorboard")
@dataclass
class TensorBoard(_Numbers):
    """TensorBoard: event files in the run's folder ``tensorboard``."""

    def on_start(self, started: Started) -> None:
        """Opens the files; a resumed run removes later steps, because it writes them again."""
        # slow to import (protobuf), and rarely needed
        from tensorboardX import (
            SummaryWriter,
        )

        purge = started.step + 1 if started.step else None
        self._events: Any = SummaryWriter(
            str(started.folder / "tensorboard"), purge_step=purge
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one event per number."""
        for tag, value in values.items():
            self._events.add_scalar(tag, value, step)

    def close(self) -> None:
        """Closes the files."""
        if hasattr(self, "_events"):
            self._events.close()


_SAMPLE_COLUMNS = ("prompt", "completion", "rewards", "advantage")


def _sample_rows(groups: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Returns a row of `_SAMPLE_COLUMNS` for each sample; one of several turns has them all, with
    their authors."""
    rows = []
    for group in groups:
        for sample in group["samples"]:
            completion = sample["completion"]
            if "turns" in sample:
                turns = [
                    f"{turn['author']}: {turn['text']}" for turn in sample["turns"]
                ]
                completion = "\n".join(turns)
            rewards = json.dumps(sample["rewards"])
            rows.append([group["prompt"], completion, rewards, sample["advantage"]])
    return rows


@register_callback("wandb")
@dataclass
class Wandb(_Numbers):
    """Weights & Biases (extra ``wandb``), with its files in the run's folder.

    ``mode=offline`` needs no account.
    """

    project: str = "nalora_jax"
    name: str = ""  # by default the name of the run's folder
    entity: str = ""
    mode: str = ""  # "online", "offline" or "disabled"; by default WANDB_MODE

    def __post_init__(self) -> None:
        self._wandb = _imported("wandb")

    def on_start(self, started: Started) -> None:
        """Starts a tracker run, or resumes the tracker run of a resumed training run."""
        self._run: Any = self._wandb.init(
            project=self.project,
            name=self.name or started.folder.resolve().name,
            entity=self.entity or None,
            mode=self.mode or None,
            dir=str(started.folder),
            id=_recorded_id(started, "wandb")
            or _record_id(started, "wandb", uuid.uuid4().hex),
            resume="allow",
            config=to_json(
                {
                    **started.config,
                    "versions": started.versions,
                    "device": started.device,
                }
            ),
        )
        # The step is an ordinary metric, because a resumed run may write some steps again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row of its table."""
        self._run.log({"step": step, **values})

    def on_samples(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Writes a table of the samples, a row each."""
        table = self._wandb.Table(columns=list(_SAMPLE_COLUMNS))
        for row in _sample_rows(groups):
            table.add_data(*row)
        self._run.log({"step": step, "samples": table})

    def on_end(self, ended: Ended) -> None:
        """Finishes the tracker run; as failed if the training run was aborted."""
        if ended.best_step is not None:
            self._run.summary["best_step"] = ended.best_step
        self._run.finish(exit_code=1 if ended.message else 0)


@register_callback("mlflow")
@dataclass
class MLflow(_Numbers):
    """MLflow (extra ``mlflow``)."""

    experiment: str = "nalora_jax"
    name: str = ""  # by default the name of the run's folder
    uri: str = ""  # of the tracking server or store; by default MLFLOW_TRACKING_URI

    def __post_init__(self) -> None:
        self._mlflow = _imported("mlflow")

    def on_start(self, started: Started) -> None:
        """Starts a tracker run, with the settings as parameters, or resumes it."""
        self._client = self._mlflow.MlflowClient(tracking_uri=self.uri or None)
        if recorded := _recorded_id(started, "mlflow"):
            self._id = recorded
            self._client.update_run(self._id, status="RUNNING")
            return
        existing = self._client.get_experiment_by_name(self.experiment)
        if existing:
            experiment = existing.experiment_id
        else:
            experiment = self._client.create_experiment(self.experiment)
        name = self.name or started.folder.resolve().name
        run_id = self._client.create_run(experiment, run_name=name).info.run_id
        self._id = _record_id(started, "mlflow", run_id)
        kind = self._mlflow.entities.Param
        params = [
            # Older servers reject longer parameters.
            kind(key, str(value)[:500])
            for key, value in flatten_settings(to_json(started.config))
        ]
        for first in range(0, len(params), 100):  # the API's limit per call
            self._client.log_batch(self._id, params=params[first : first + 100])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one batch of metrics."""
        now = int(time.time() * 1000)
        metrics = [
            self._mlflow.entities.Metric(tag, float(value), now, step)
            for tag, value in values.items()
        ]
        # The API's limit per call.
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[first : first + 1000])

    def on_samples(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Writes a table of the samples, in the form of MLflow's tables, a row each."""
        table = {"columns": list(_SAMPLE_COLUMNS), "data": _sample_rows(groups)}
        self._client.log_dict(self._id, table, f"samples/{step}.json")

    def on_end(self, ended: Ended) -> None:
        """Finishes the tracker run."""
        self._client.set_terminated(self._id, "FAILED" if ended.message else "FINISHED")


def _recorded_id(started: Started, folder: str) -> str | None:
    """Returns the id of the tracker's run if the run is resumed and has one."""
    path = started.folder / folder / _RUN_ID
    if started.step and path.exists():
        return path.read_text(encoding="utf-8")
    return None


def _record_id(started: Started, folder: str, run_id: str) -> str:
    """Records the id of the tracker's run, and returns it."""
    path = started.folder / folder / _RUN_ID
    path.parent.mkdir(parents=True, exist_ok=True)
    with name_file_in_errors(path), open_unlinked(path, "w", encoding="utf-8") as file:
        file.write(run_id)
    return run_id


def _imported(name: str) -> Any:
    """Imports the tracker's library, before a run writes any file."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        remedy = f"pip install {name} (or nalora_jax with its extra `{name}`)"
        raise NaloraError(
            f"--callbacks {name}",
            expected=f"the library {name}",
            found=error,
            remedy=remedy,
        ) from error
