"""Callbacks that send a run's metrics to TensorBoard, Weights & Biases or MLflow.

Each imports its library when it is used, so a run only needs the libraries that its settings name.
"""

from __future__ import annotations

import importlib
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nalora_jax.common.paths import naming, open_unlinked
from nalora_jax.config.structured import dotted
from nalora_jax.errors import NaloraError
from nalora_jax.train.callbacks import Callback, Ended, Started, register_callback
from nalora_jax.train.metrics import scalars, to_json

_RUN_ID = "nalora_run_id"  # file in a tracker's folder: id of its run, for resumption


class _Numbers(Callback):
    """Base of the trackers: tags every number, e.g. "train/loss" or "misalignment/layer_03"."""

    def on_log(self, step: int, record: Mapping[str, Any]) -> None:
        """Writes the numbers of a log step."""
        self.write(step, dict(scalars(to_json({"step": step, **record}))))

    def on_eval(self, step: int, values: Mapping[str, Any], kind: str) -> None:
        """Writes the numbers of an evaluation; base and result have separate tags."""
        numbers = scalars(
            to_json({"eval": {name: value for name, value in values.items() if name != "right"}})
        )
        tag = {"initial": "before/", "final": "after/"}.get(kind, "eval/")
        self.write(step, {tag + name.removeprefix("eval/"): value for name, value in numbers})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by tag."""
        raise NotImplementedError


@register_callback("tensorboard")
@dataclass
class TensorBoard(_Numbers):
    """TensorBoard: event files in the run's folder ``tensorboard``."""

    def on_start(self, started: Started) -> None:
        """Opens the files; a resumed run removes later steps, because it writes them again."""
        from tensorboardX import SummaryWriter  # slow to import (protobuf), and rarely needed

        purge = started.step + 1 if started.step else None
        self._events: Any = SummaryWriter(str(started.folder / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one event per number."""
        for tag, value in values.items():
            self._events.add_scalar(tag, value, step)

    def close(self) -> None:
        """Closes the files."""
        if hasattr(self, "_events"):
            self._events.close()


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
            id=_run_id(started, "wandb"),
            resume="allow",
            config=to_json({**started.config, "versions": started.versions, "device": started.device}),
        )
        # The step is an ordinary metric, because a resumed run may write some steps again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row of its table."""
        self._run.log({"step": step, **values})

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
        id_file = started.folder / "mlflow" / _RUN_ID
        if started.step and id_file.exists():
            self._id = id_file.read_text(encoding="utf-8")
            self._client.update_run(self._id, status="RUNNING")
            return
        existing = self._client.get_experiment_by_name(self.experiment)
        experiment = existing.experiment_id if existing else self._client.create_experiment(self.experiment)
        name = self.name or started.folder.resolve().name
        self._id = self._client.create_run(experiment, run_name=name).info.run_id
        _write_id(id_file, self._id)
        kind = self._mlflow.entities.Param
        params = [kind(key, str(value)[:500]) for key, value in dotted(to_json(started.config))]
        for first in range(0, len(params), 100):  # the API's limit per call
            self._client.log_batch(self._id, params=params[first : first + 100])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one batch of metrics."""
        now = int(time.time() * 1000)
        metrics = [
            self._mlflow.entities.Metric(tag, float(value), now, step) for tag, value in values.items()
        ]
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[first : first + 1000])

    def on_end(self, ended: Ended) -> None:
        """Finishes the tracker run."""
        self._client.set_terminated(self._id, "FAILED" if ended.message else "FINISHED")


def _run_id(started: Started, folder: str) -> str:
    """Returns the id of the tracker's run: the recorded one if the run is resumed, or a new one."""
    path = started.folder / folder / _RUN_ID
    if started.step and path.exists():
        return path.read_text(encoding="utf-8")
    run_id = uuid.uuid4().hex
    _write_id(path, run_id)
    return run_id


def _write_id(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open_unlinked(path, "w", encoding="utf-8") as file:
        file.write(text)


def _imported(name: str) -> Any:
    """Imports the tracker's library, before a run writes any file."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        remedy = f"pip install {name} (or nalora_jax with its extra `{name}`)"
        raise NaloraError(
            f"--callbacks {name}", expected=f"the library {name}", found=error, remedy=remedy
        ) from error
