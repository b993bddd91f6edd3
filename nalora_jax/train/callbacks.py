"""What a run tells others of itself while it goes on: a small protocol, and those who listen by name.

    class Loudest(Callback):
        def on_log(self, step, record):
            print(step, record["loss"])

    run(config, callbacks=[Loudest()])

``config.callbacks`` names those of `nalora_jax.train.trackers` and whatever `register_callback` adds, with settings:
``"wandb:project=gates,mode=offline"``. The run's own log, metrics.jsonl, is one too, and always the first.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from nalora_jax.errors import NaloraError
from nalora_jax.redaction import MARK
from nalora_jax.registry import Registry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """What is known when a run begins, or goes on."""

    folder: Path
    config: Mapping[str, Any]  # its settings as nested dicts
    step: int = 0  # steps that it has had; above 0 where it is continued
    versions: Mapping[str, str] = field(default_factory=dict)  # of the libraries
    device: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)  # the base model's origin, figures of the training data


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    step: int | None = None  # the last one; None where it was broken off
    best_step: int | None = None  # the one that was exported
    message: str = ""  # why it was broken off
    seconds: Mapping[str, float] = field(default_factory=dict)  # wall time by stage, in their order


class Callback:
    """Listens to a run; derive from it and say what differs. Only the first of several processes calls it.

    One that raises anything but a NaloraError, of this library, or a KeyboardInterrupt is named in the log and left out
    from then on: a run does not end because a server of somebody else does not answer.
    """

    def on_start(self, started: Started) -> None:
        """The run begins, or goes on; what is raised here ends it."""

    def on_log(self, step: int, record: Mapping[str, Any]) -> None:
        """A log step: ``loss``, ``learning_rate``, ``tokens_per_second``, ..., and ``layers``, arrays by name."""

    def on_eval(self, step: int, values: Mapping[str, Any], kind: str) -> None:
        """An evaluation: ``kind`` is "initial" (the base), "" (what chooses the checkpoint) or "final" (the result)."""

    def on_save(self, step: int, folder: Path) -> None:
        """A checkpoint of this step is being written into ``folder``, behind the steps that follow."""

    def on_end(self, ended: Ended) -> None:
        """The run has ended, well or not."""


class Callbacks:
    """All who listen to a run, the run's own log first; a context manager that ends what was not ended.

    Args:
      own: the run's log, which may fail the run; None for processes that keep none.
      others: the rest.
    """

    def __init__(self, own: Callback | None, others: Sequence[Callback] = ()) -> None:
        self._own, self._others = own, list(others)

    def start(self, started: Started) -> None:
        """Tell all that the run begins, its own log last: nothing is in it of a run that could not begin.

        Raises:
          NaloraError: one of them cannot begin.
        """
        for one in self._others:
            try:
                one.on_start(started)
            except NaloraError:
                raise
            except Exception as error:
                found = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
                expected = "a callback that can begin"
                raise NaloraError(f"--callbacks, {type(one).__name__}", expected=expected, found=found) from error
        if self._own is not None:
            self._own.on_start(started)

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Tell all about a log step."""
        self._tell("on_log", step, record)

    def evaluation(self, step: int, values: Mapping[str, Any], kind: str = "") -> None:
        """Tell all about an evaluation."""
        self._tell("on_eval", step, values, kind)

    def save(self, step: int, folder: Path) -> None:
        """Tell all about a checkpoint."""
        self._tell("on_save", step, folder)

    def end(self, ended: Ended) -> None:
        """Tell all that the run has ended."""
        self._tell("on_end", ended)

    def _tell(self, event: str, *values: Any) -> None:
        if self._own is not None:
            getattr(self._own, event)(*values)
        for one in list(self._others):
            try:
                getattr(one, event)(*values)
            except (NaloraError, KeyboardInterrupt):
                raise
            except Exception as error:
                self._others.remove(one)
                name = type(one).__name__
                log.warning("%s is left out from here on: %s: %s", name, type(error).__name__, error, exc_info=True)

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del kind, error, trace
        for one in (self._own, *self._others):
            close = getattr(one, "close", None)
            if close is not None:
                close()


Kind = TypeVar("Kind", bound=type[Callback])
_CALLBACKS: Registry[Callable[..., Callback]] = Registry("callback", "nalora_jax.callbacks", "--callbacks")


def register_callback(name: str) -> Callable[[Kind], Kind]:
    """A decorator that makes a class selectable as ``--callbacks NAME``.

    Its settings are the fields of the dataclass that it is; each needs a default, whose type it has.
    """

    def add(kind: Kind) -> Kind:
        _CALLBACKS.add(name, kind)
        return kind

    return add


def make_callbacks(texts: Sequence[str]) -> list[Callback]:
    """Makes the callbacks that settings name: ``NAME`` or ``NAME:setting=value,...``.

    Raises:
      NaloraError: an unknown name or setting, a value of the wrong type, or a resumed run's password, which its log
        does not hold.
    """
    for text in texts:
        if MARK in text:
            remedy = "name --callbacks again: passwords and tokens are not recorded"
            raise NaloraError("--callbacks", expected="the callback with its password", found=text, remedy=remedy)
    importlib.import_module("nalora_jax.train.trackers")  # registers those of this library
    return [_make(text) for text in texts]


def _make(text: str) -> Callback:
    name, _, options = text.partition(":")
    kind: Any = _CALLBACKS.get(name)
    known = {one.name: one for one in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    settings: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if key not in known or not equals:
            expected = f"NAME:setting=value, with a setting of {', '.join(known) or 'none'}"
            raise NaloraError(f"--callbacks {text}", expected=expected, found=option)
        settings[key] = _typed(text, key, value, known[key].default)
    callback: Callback = kind(**settings)
    return callback


def _typed(text: str, key: str, value: str, default: Any) -> Any:
    """``value`` as the type that the setting's default has."""
    try:
        return {"true": True, "false": False}[value.lower()] if isinstance(default, bool) else type(default)(value)
    except (KeyError, ValueError):
        expected = f"{key} of type {type(default).__name__}"
        raise NaloraError(f"--callbacks {text}", expected=expected, found=repr(value)) from None
