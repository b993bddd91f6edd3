"""Callbacks of a training run: the `Callback` protocol and a registry by name.

    class Loudest(Callback):
        def on_log(self, step, record):
            print(step, record["loss"])

    run(config, callbacks=[Loudest()])

``config.callbacks`` names callbacks of `nalora_jax.train.log` or of `register_callback`, with
settings: ``"wandb:project=gates,mode=offline"``. What else surrounds a run is a callback too: its
log, metrics.jsonl, its card and its report. They are `required`, and called first, except at the
start of a run.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from nalora_jax.common.redaction import REDACTED
from nalora_jax.common.registry import Registry, parse_instance
from nalora_jax.errors import NaloraError, describe_error

if TYPE_CHECKING:
    from nalora_jax.kinds.record import Job
    from nalora_jax.models.targets import AdapterSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """Facts about a run when it starts or resumes."""

    folder: Path
    config: Mapping[str, Any]  # its settings as nested dicts
    step: int = 0  # completed steps; above 0 if the run is resumed
    versions: Mapping[str, str] = field(default_factory=dict)  # of the libraries
    device: str = ""
    # the base model's origin, figures of the training data
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """The outcome of a run."""

    step: int | None = None  # last step; None if the run was aborted
    best_step: int | None = None  # exported step
    message: str = ""  # reason for the abort
    # wall time by stage, in order
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """The adapter of a run, once its files are written."""

    folder: Path  # of the adapter
    job: Job
    spec: AdapterSpec  # of the exported adapter
    step: int  # exported step
    before: Mapping[str, Any]  # held-out metrics of the base
    after: Mapping[str, Any]  # held-out metrics of the adapter


class Callback:
    """Base class of callbacks; subclasses override the events they need.

    Only the first of several processes calls it. A callback that raises an exception other than
    NaloraError or KeyboardInterrupt is named in the log and not called again: a tracking server
    that does not respond must not end the run. Errors of a `required` one end it.
    """

    required: ClassVar[bool] = False

    def on_start(self, started: Started) -> None:
        """Handles the start or the resumption of the run; an exception here ends the run."""

    def on_log(self, step: int, record: Mapping[str, Any]) -> None:
        """Handles a log step.

        The record has ``loss``, ``learning_rate``, ``tokens_per_second``, ..., and ``layers``,
        arrays by metric.
        """

    def on_samples(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Handles samples of a log step of a run with rewards: some groups, of one prompt each.

        A group has ``prompt`` and ``samples``, each with ``completion``, ``rewards`` by name and
        ``advantage``; with an environment also ``turns``, each with ``author`` ("model" or
        "environment") and ``text``.
        """

    def on_eval(self, step: int, values: Mapping[str, Any], kind: str) -> None:
        """Handles an evaluation.

        ``kind`` is "initial" (the base), "" (the evaluation that ranks checkpoints) or "final" (the
        result).
        """

    def on_save(self, step: int, folder: Path) -> None:
        """Handles a checkpoint that is being written into ``folder`` in the background."""

    def on_export(self, exported: Exported) -> None:
        """Handles the adapter's files."""

    def on_end(self, ended: Ended) -> None:
        """Handles the end of the run, normal or aborted."""


def read_samples(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Returns the groups of samples after byte ``start`` of a run's file, and its end in bytes."""
    with path.open("rb") as file:
        file.seek(start)
        groups = [json.loads(line) for line in file]
        return groups, file.tell()


class Callbacks(AbstractContextManager["Callbacks"]):
    """All callbacks of a run, required ones first; a context manager that closes them."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = sorted(callbacks, key=lambda one: not one.required)

    def start(self, started: Started) -> None:
        """Calls ``on_start`` of all callbacks, required ones last.

        The run's log is required: it records nothing if another callback cannot start.

        Raises:
          NaloraError: a callback cannot start.
        """
        for callback in sorted(self._callbacks, key=lambda one: one.required):
            try:
                callback.on_start(started)
            except NaloraError:
                raise
            except Exception as error:
                if callback.required:
                    raise
                reason = " ".join(describe_error(error).split())[:400]
                expected = "a callback that can begin"
                raise NaloraError(
                    f"--callbacks, {type(callback).__name__}",
                    expected=expected,
                    found=reason,
                ) from error

    def tell(self, event: str, *values: Any) -> None:
        """Calls a method of all callbacks, e.g. ``tell("on_log", step, record)``."""
        for callback in list(self._callbacks):
            try:
                getattr(callback, event)(*values)
            except (NaloraError, KeyboardInterrupt):
                raise
            except Exception as error:
                if callback.required:
                    raise
                self._callbacks.remove(callback)
                name = type(callback).__name__
                log.warning(
                    "%s is left out from here on: %s: %s",
                    name,
                    type(error).__name__,
                    error,
                    exc_info=True,
                )

    def __exit__(self, *error: object) -> None:
        """Closes all callbacks that have a method ``close``."""
        for callback in self._callbacks:
            close = getattr(callback, "close", None)
            if close is not None:
                close()


_CallbackType = TypeVar("_CallbackType", bound=type[Callback])
_CALLBACKS: Registry[Any] = Registry("callback", "nalora_jax.callbacks", "--callbacks")


def register_callback(name: str) -> Callable[[_CallbackType], _CallbackType]:
    """Returns a decorator that makes a class selectable as ``--callbacks NAME``.

    Its settings are its dataclass fields; each needs a default, whose type the setting has.
    """
    return _CALLBACKS.decorator(name)


def make_callbacks(texts: Sequence[str]) -> list[Callback]:
    """Makes callbacks from settings: ``NAME`` or ``NAME:setting=value,...``.

    Raises:
      NaloraError: an unknown name or setting, a value of the wrong type, or a redacted password in
        the settings of a resumed run (logs do not contain passwords).
    """
    for text in texts:
        if REDACTED in text:
            remedy = "name --callbacks again: passwords and tokens are not recorded"
            raise NaloraError(
                "--callbacks",
                expected="the callback with its password",
                found=text,
                remedy=remedy,
            )
    importlib.import_module("nalora_jax.train.log")  # registers the built-in callbacks
    return [parse_instance(_CALLBACKS, text) for text in texts]
