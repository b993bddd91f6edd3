"""What a study compares and how, fixed before anything is run: a TOML file with comments.

question = "What is a step on the gate worth?"
models = ["smollm2-135m-instruct"]
baseline = "all"                      # the method that the others are compared with
rates = [1e-3, 2e-3, 4e-3]            # learning rates that every method is tuned over
tuning_seeds = [0]                    # seeds of the runs that choose the rate, on the validation items
test_seeds = [1, 2, 3, 4, 5]          # seeds of the runs at that rate, which alone read the test items
evaluate_every = 100

[run]                                 # settings of every run, as of `nalora_jax.config.RunConfig`
steps = 300
train.batch_size = 4

[tasks.socialiqa]
dataset = "socialiqa"
train = "train[:-2000]"
validation = "train[-2000:]"
test = "validation"

[methods.all]
[methods.gate_twice]
settings.optimizer.rates = [["ffn/gate_proj", 2.0]]
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from nalora_jax.config import DataConfig, RunConfig, check
from nalora_jax.errors import NaloraError
from nalora_jax.imports import import_files
from nalora_jax.study.overrides import checked, override

FILE = "protocol.toml"
# What belongs to the study, not to a method: otherwise runs would not be pairs. And what a run without files ignores.
_STUDYS_OWN = (
    "model",
    "seed",
    "steps",
    "epochs",
    "data",
    "vision",
    "train",
    "output",
    "resume",
    "callbacks",
    "mesh",
    "debug",
)


@dataclass(frozen=True)
class Task:
    """Data to train on and two sets of fixed items to measure on."""

    # A task of this library, "tfds:<name>", a JSONL file or a folder of images, as `DataConfig.dataset`.
    dataset: str
    # Split expressions; no two of them share a record.
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    # Items of each at most, drawn once by a fixed seed (0: all).
    validation_items: int = 1000
    test_items: int = 1000
    # Of the test items with choices those whose every choice is scored, for the accuracy beside the loss, drawn as they
    # are (0: all). A choice takes as long as the answer's own loss.
    accuracy_items: int = 0
    # Other settings of the data, as of a DataConfig, e.g. {max_length = 256}.
    data: dict[str, Any] = field(default_factory=dict)
    # Settings of images, as of a VisionConfig, e.g. {task = "classify", shots = 4}.
    vision: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ForgettingProbe:
    """Items of other data, measured before and after the test runs: what the training made the model forget."""

    dataset: str
    split: str = "validation"
    items: int = 1000


@dataclass(frozen=True)
class Method:
    """One way to train."""

    # What it is, for the report's readers.
    about: str = ""
    # Settings of its own, put onto those of [run].
    settings: dict[str, Any] = field(default_factory=dict)
    # The method whose mechanism this one imitates without its information.
    placebo_of: str = ""
    # Added to the seed of the fresh adapters, and to nothing else: pairs share their data but not their A.
    reseed: int = 0


@dataclass(frozen=True)
class Protocol:
    """A study: everything that decides which runs there are and what is read from them."""

    # The question that it answers.
    question: str
    # Base models, as `RunConfig.model`.
    models: tuple[str, ...]
    # The method that the others are compared with.
    baseline: str
    # Learning rates, ascending.
    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    test_seeds: tuple[int, ...]
    tasks: dict[str, Task]
    methods: dict[str, Method]
    # Settings of every run.
    run: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, ForgettingProbe] = field(default_factory=dict)
    # Python files that register rules of the study's own, relative to its folder; they are executed.
    imports: tuple[str, ...] = ()
    # What chooses learning rates and is compared first; accuracy and recall (of images) as 1 minus them.
    metric: Literal["loss", "accuracy", "recall"] = "loss"
    # Steps between evaluations on the validation items.
    evaluate_every: int = 100
    # Rates that are added at most at either end of the grid, while the best one lies at that end.
    extend: int = 2
    # Multiples of its chosen rate that each method is tested at, 1 among them: others show where it breaks.
    test_multiples: tuple[float, ...] = (1.0,)
    # Differences of less than this, in the metric's unit (nats per token or image), count as none.
    margin: float = 0.005
    # Hours of all runs together after which no further one is begun (0: no bound).
    budget_hours: float = 0.0
    # Not in the file: where it is, and sha256 of its content without comments and layout.
    path: Path = field(default=Path(FILE), compare=False)
    digest: str = field(default="", compare=False)
    _settings: dict[tuple[str, str], RunConfig] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def folder(self) -> Path:
        """Where the records, the tables and the pictures go."""
        return self.path.parent

    def config(self, model: str, task: str, method: str, rate: float, seed: int) -> RunConfig:
        """The settings of one run.

        Raises:
          NaloraError: they are not settings, or out of range.
        """
        if (task, method) not in self._settings:  # checking types takes a millisecond, and a plan names all runs
            self._settings[task, method] = self._of_method(task, method)
        own = self._settings[task, method]
        return replace(own, model=model, seed=seed, optimizer=replace(own.optimizer, learning_rate=rate))

    def _of_method(self, task: str, method: str) -> RunConfig:
        chosen = self.tasks[task]
        common = override(RunConfig().without_mechanisms(), self.run, "[run]")
        data = override(replace(common.data, dataset=chosen.dataset), chosen.data, f"[tasks.{task}] data")
        data = replace(data, train_split=chosen.train, eval_split=chosen.validation, eval_limit=chosen.validation_items)
        vision = override(common.vision, chosen.vision, f"[tasks.{task}] vision")
        if vision.task == "chat":
            where = f"[tasks.{task}] vision task"
            raise NaloraError(where, expected='"classify", "contrast", or none for text', found='"chat"')
        own = override(
            replace(common, data=data, vision=vision), self.methods[method].settings, f"[methods.{method}] settings"
        )
        return check(replace(own, output=RunConfig().output, resume=False))  # neither means anything to a study


def read_protocol(path: str | Path) -> Protocol:
    """The protocol in ``path``, a TOML file or the folder that holds ``protocol.toml``, checked as far as possible.

    Raises:
      NaloraError: no such file, not TOML, names or values that mean nothing; the message names the place.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = f"give a study's folder with a {FILE}, or the file"
        raise NaloraError(str(path), expected="a study", found=error.strerror or error, remedy=remedy) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NaloraError(str(path), expected="a TOML file", found=error) from error
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    try:
        protocol = replace(_build(Protocol, table, "top level"), path=path, digest=digest)
        import_files(protocol.imports, path.parent)
        _check(protocol)
    except NaloraError as error:
        found, remedy = error.found, error.remedy
        raise NaloraError(f"{path}: {error.where}", expected=error.expected, found=found, remedy=remedy) from error
    return protocol


_NOT_IN_THE_FILE = ("path", "digest", "_settings")
_TABLES: dict[str, type] = {"tasks": Task, "methods": Method, "probes": ForgettingProbe}


def _build(kind: type, table: Mapping[str, Any], where: str) -> Any:
    """A dataclass of a TOML table."""
    hints = {one.name: get_type_hints(kind)[one.name] for one in fields(kind) if one.name not in _NOT_IN_THE_FILE}
    unknown = sorted(table.keys() - hints.keys())
    if unknown:
        raise NaloraError(where, expected=f"only {', '.join(hints)}", found=unknown[0])
    values = {}
    for name, value in table.items():
        place = name if where == "top level" else f"{where} {name}"
        if name in _TABLES and isinstance(value, Mapping):
            value = {key: _build(_TABLES[name], one, f"[{name}.{key}]") for key, one in value.items()}
        elif isinstance(value, list):
            value = tuple(float(one) if "float" in str(hints[name]) and type(one) is int else one for one in value)
        values[name] = checked(value, hints[name], place)
    missing = [one.name for one in fields(kind) if one.name in hints and one.name not in values and _required(one)]
    if missing:
        raise NaloraError(where, expected=f"a value of {missing[0]}", found="none")
    return kind(**values)


def _required(one: Any) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _check(protocol: Protocol) -> None:
    """Raises unless the parts fit together and every run's settings are in range."""
    p = protocol
    for name in ("models", "tasks", "methods", "rates", "tuning_seeds", "test_seeds"):
        _require(name, bool(getattr(p, name)), "at least one", "none")
        value = getattr(p, name)
        _require(name, len(set(value)) == len(value), "no value twice", value)
    _require("rates", list(p.rates) == sorted(p.rates) and p.rates[0] > 0, "ascending rates above 0", p.rates)
    _require("rates", p.extend == 0 or len(p.rates) > 1, "two rates, to extend the grid", p.rates)
    _require("extend", p.extend >= 0, "0 or more", p.extend)
    _require("evaluate_every", p.evaluate_every >= 1, "1 or more", p.evaluate_every)
    _require("margin", p.margin > 0, "a number above 0", p.margin)
    _require("budget_hours", p.budget_hours >= 0, "0 or more", p.budget_hours)
    _require("test_multiples", 1.0 in p.test_multiples and min(p.test_multiples) > 0, "1 among them", p.test_multiples)
    shared = set(p.tuning_seeds) & set(p.test_seeds)
    _require("test_seeds", not shared, "no seed that tunes", sorted(shared))
    _require("baseline", p.baseline in p.methods, f"one of {', '.join(p.methods)}", p.baseline)
    for name, one in p.methods.items():
        _check_method(p, name, one)
    for name, given in p.tasks.items():
        where, some = f"[tasks.{name}] accuracy_items", given.accuracy_items
        _require(where, some >= 0, "0 (all) or more", some)
        _require(where, not (some and given.vision), "none for images: one pass scores all classes", some)
    kinds = set()
    for model in p.models:
        for task in p.tasks:
            for method in p.methods:
                measured = p.config(model, task, method, p.rates[0], p.tuning_seeds[0]).vision.task
                fits = p.metric == "loss" or measured == {"accuracy": "classify", "recall": "contrast"}[p.metric]
                _require("metric", fits, f"what [tasks.{task}] measures along the way", p.metric)
                kinds.add("images" if measured else "text")
    _require("tasks", len(kinds) == 1, "all of text or all of images: a model is for either", "both")


def _check_method(p: Protocol, name: str, method: Method) -> None:
    where = f"[methods.{name}]"
    known = method.placebo_of in ("", *p.methods) and method.placebo_of != name
    _require(f"{where} placebo_of", known, "another method", method.placebo_of)
    owned = [one for one in method.settings if one in _STUDYS_OWN]
    _require(f"{where} settings", not owned, "no setting that belongs in [run] or [tasks]", ", ".join(owned))
    rate = "learning_rate" in method.settings.get("optimizer", {})
    _require(f"{where} settings", not rate, "no learning rate, which the grid gives", "optimizer.learning_rate")


def _require(where: str, fine: bool, expected: str, found: object) -> None:
    if not fine:
        raise NaloraError(where, expected=expected, found=found)


def data_of(dataset: str, split: str, items: int, like: DataConfig) -> DataConfig:
    """``like`` with other held-out items."""
    return replace(like, dataset=dataset, eval_split=split, eval_limit=items)
