"""The protocol of a study, fixed before its runs: a TOML file with comments.

question = "What is a step on the gate worth?"
models = ["smollm2-135m-instruct"]
baseline = "all"                      # method that the others are compared with
rates = [1e-3, 2e-3, 4e-3]            # learning rates that every method is tuned over
tuning_seeds = [0]                    # of the runs that choose the rate, on validation items
test_seeds = [1, 2, 3, 4, 5]          # seeds of the runs at that rate, which read the test items
evaluate_every = 100

[run]                                 # settings of every run, fields of `RunConfig`
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

import itertools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from nalora_jax.common.digests import json_digest
from nalora_jax.common.imports import import_files
from nalora_jax.config import DataConfig, LoRARule, RunConfig, VisionConfig
from nalora_jax.config.structured import (
    AMOUNT,
    COUNT,
    INTERNAL,
    SIZE,
    Range,
    check_ranges,
    parse_dataclass,
)
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.record import check_run_config
from nalora_jax.method.rules import make
from nalora_jax.study.subjects import subject_of

_FILE = "protocol.toml"
# Settings that methods must share, because their runs are paired, and settings of a run's files.
_OF_THE_STUDY = (
    *(
        "model",
        "seed",
        "steps",
        "epochs",
        "data",
        "preference",
        "rl",
        "vision",
        "train",
    ),
    *("output", "resume", "callbacks", "debug"),
)

_GATES = "ffn/(gate|in)_proj"  # as `nalora_jax.method.low_rank.find_gates`


@dataclass(frozen=True)
class Task:
    """Training data, and two fixed sets of held-out items."""

    # A task, "tfds:<name>", a JSONL file or a folder of images, as `DataConfig.dataset`.
    dataset: str
    # Split expressions; no two of them share a record.
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    # Largest number of items of each, drawn once by a fixed seed (0: all).
    validation_items: Annotated[int, COUNT] = 1000
    test_items: Annotated[int, COUNT] = 1000
    # Number of test items whose choices are scored for the accuracy, drawn by a fixed seed (0:
    # all). A choice takes as long as the loss of the correct completion.
    accuracy_items: Annotated[int, COUNT] = 0
    # Other settings of the data, fields of DataConfig, e.g. {max_length = 256}.
    data: dict[str, Any] = field(default_factory=dict)
    # Settings of images, fields of VisionConfig, e.g. {task = "classify", shots = 4}.
    vision: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ForgettingProbe:
    """Items of other data, measured before and after test runs to detect forgetting."""

    dataset: str
    split: str = "validation"
    items: Annotated[int, COUNT] = 1000


@dataclass(frozen=True)
class Method:
    """A training method."""

    # Description for the report.
    about: str = ""
    # Settings that replace those of [run].
    settings: dict[str, Any] = field(default_factory=dict)
    # The method that this permutation control (placebo) imitates without its information.
    placebo_of: str = ""
    # Added to the seed of the fresh adapters only: pairs share their data but not their A.
    reseed: int = 0
    # No adapter on the gate: the rules of the method, or of [run], act on other projections only.
    no_gate: bool = False


@dataclass(frozen=True)
class Protocol:
    """A study: everything that determines its runs and their evaluation."""

    # The question that the study answers.
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
    # Python files that register the study's rules, relative to its folder; they are executed.
    imports: tuple[str, ...] = ()
    # Primary metric, which chooses learning rates; accuracy, recall and reward count as 1 - value.
    metric: Literal["loss", "accuracy", "recall", "reward"] = "loss"
    # Steps between evaluations on the validation items.
    evaluate_every: Annotated[int, SIZE] = 100
    # Largest number of rates added at either end of the grid while the best rate is there.
    extend: Annotated[int, COUNT] = 2
    # Multiples of the chosen rate at which each method is tested, including 1.
    test_multiples: tuple[float, ...] = (1.0,)
    # Margin of equivalence as a share of the training gain: of the fall of the validation loss (or
    # 1 - metric) from the base model to the baseline's tuning runs at its chosen rate.
    margin_share: Annotated[float, Range("a share", "(0, 1)")] = 0.05
    # Margin in the metric's unit (nats per token or image), in place of a share; 0: by the share.
    margin: Annotated[float, AMOUNT] = 0.0
    # Total hours of all runs after which no further run starts (0: no limit).
    budget_hours: Annotated[float, AMOUNT] = 0.0
    # sha256 of this protocol in earlier spellings of the same settings, which the records' history
    # in the repository has; the tables show them.
    respelled_from: tuple[str, ...] = ()
    # Not in the file: its path, and the sha256 of its content without comments and layout.
    path: Path = field(default=Path(_FILE), compare=False, metadata=INTERNAL)
    digest: str = field(default="", compare=False, metadata=INTERNAL)
    _settings: dict[tuple[str, str], RunConfig] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def folder(self) -> Path:
        """Returns the folder of the records, tables and pictures."""
        return self.path.parent

    @property
    def several_meshes(self) -> bool:
        """Returns True if methods differ in their devices."""
        return any("mesh" in method.settings for method in self.methods.values())

    def config(
        self, model: str, task: str, method: str, rate: float, seed: int
    ) -> RunConfig:
        """Returns the settings of one run.

        Raises:
          NaloraError: a setting is unknown or out of range.
        """
        if (task, method) not in self._settings:  # a plan has many runs
            self._settings[task, method] = self._compose(task, method)
        config = self._settings[task, method]
        optimizer = replace(config.optimizer, learning_rate=rate)
        return replace(config, model=model, seed=seed, optimizer=optimizer)

    def _first(self, method: str) -> RunConfig:
        """Returns the settings of a method on the first task with the first model."""
        task = next(iter(self.tasks))
        return self.config(self.models[0], task, method, self.rates[0], 0)

    def _compose(self, task: str, method: str) -> RunConfig:
        """Returns the settings of a method on a task: those of [run], the task and the method.

        Raises:
          NaloraError: a setting is unknown or out of range, or the task is a chat with images.
        """
        chosen = self.tasks[task]
        base = RunConfig().without_mechanisms()
        common = parse_dataclass(RunConfig, self.run, "[run] ", base=base)
        data = replace(common.data, dataset=chosen.dataset)
        data = parse_dataclass(
            DataConfig, chosen.data, f"[tasks.{task}] data.", base=data
        )
        data = replace(
            data,
            train_split=chosen.train,
            eval_split=chosen.validation,
            eval_limit=chosen.validation_items,
        )
        where = f"[tasks.{task}] vision."
        vision = parse_dataclass(VisionConfig, chosen.vision, where, base=common.vision)
        if vision.reads_chats:
            raise NaloraError(
                f"[tasks.{task}] vision task",
                expected='"classify", "contrast", or none for text',
                found='"chat"',
            )
        common = replace(common, data=data, vision=vision)
        settings = self.methods[method].settings
        where = f"[methods.{method}] settings."
        config = parse_dataclass(RunConfig, settings, where, base=common)
        if self.methods[method].no_gate:
            rules = (LoRARule(_GATES, rank=0), *config.lora.rules)
            config = replace(config, lora=replace(config.lora, rules=rules))
        for rule in config.mechanisms:
            make(rule)  # raises for an unknown name or setting
        config = replace(config, output=RunConfig().output, resume=False)
        return check_run_config(config)  # runs of a study have no folder


def read_protocol(path: str | Path) -> Protocol:
    """Reads and checks the protocol in ``path``, a TOML file or a folder with ``protocol.toml``.

    Raises:
      NaloraError: no such file, not TOML, or unknown names or values; the message names the
        location.
    """
    path = Path(path)
    if path.is_dir():
        path /= _FILE
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NaloraError(
            str(path),
            expected="a study",
            found=error.strerror or error,
            remedy=f"give a study's folder with a {_FILE}, or the file",
        ) from error
    except (ValueError, RecursionError) as error:
        # not UTF-8, no TOML, 5,000 digits, 3,000 brackets
        raise NaloraError(str(path), expected="a TOML file", found=error) from error
    digest = json_digest(table, sort_keys=True, default=str)  # dates as text
    try:
        protocol = replace(parse_dataclass(Protocol, table), path=path, digest=digest)
        import_files(protocol.imports, path.parent)
        for where, fine, expected, actual in _requirements(protocol):
            if not fine:
                raise NaloraError(where, expected=expected, found=actual)
    except NaloraError as error:
        raise NaloraError(
            f"{path}: {error.where}",
            expected=error.expected,
            found=error.found,
            remedy=error.remedy,
        ) from error
    return protocol


# field, True if it is met, expected and found values
Requirement = tuple[str, bool, str, object]


def _requirements(p: Protocol) -> Iterator[Requirement]:
    """Yields the requirements of the protocol ``p``, in order.

    The caller raises an error for the first that is not met, so that later ones may rely on it.
    """
    check_ranges(p, "")
    for name in ("models", "tasks", "methods", "rates", "tuning_seeds", "test_seeds"):
        value = getattr(p, name)
        yield name, bool(value), "at least one", "none"
        yield name, len(set(value)) == len(value), "no value twice", value
    ascending = list(p.rates) == sorted(p.rates) and p.rates[0] > 0
    shared = set(p.tuning_seeds) & set(p.test_seeds)
    multiples = p.test_multiples
    updates = 1
    if p.baseline in p.methods:
        updates = p._first(p.baseline).rl.updates
    between = f"a multiple of rl.updates, {updates}: a run resumes between rollouts"
    yield "rates", ascending, "ascending rates above 0", p.rates
    yield (
        "rates",
        p.extend == 0 or len(p.rates) > 1,
        "two rates, to extend the grid",
        p.rates,
    )
    yield (
        "test_multiples",
        1.0 in multiples and min(multiples) > 0,
        "1 among them",
        multiples,
    )
    yield "test_seeds", not shared, "no seed that tunes", sorted(shared)
    yield (
        "baseline",
        p.baseline in p.methods,
        f"one of {', '.join(p.methods)}",
        p.baseline,
    )
    for name, method in p.methods.items():
        yield from _method_requirements(p, name, method)
    for name, task in p.tasks.items():
        yield from _task_requirements(p, name, task)
    for name, probe in p.probes.items():
        check_ranges(probe, f"[probes.{name}] ")
    yield "evaluate_every", p.evaluate_every % updates == 0, between, p.evaluate_every
    kinds = set()
    for model, name, method_name in itertools.product(p.models, p.tasks, p.methods):
        config = p.config(model, name, method_name, p.rates[0], p.tuning_seeds[0])
        subject = subject_of(config)
        fits = p.metric in ("loss", subject.metric(config))
        expected = f"a metric that [tasks.{name}] measures during training"
        yield "metric", fits, expected, p.metric
        kinds.add(subject.reads_images)
    yield "tasks", len(kinds) == 1, "tasks of text only or of images only", "both"


def _method_requirements(
    p: Protocol, name: str, method: Method
) -> Iterator[Requirement]:
    """Yields the requirements of one method of the protocol ``p``."""
    where = f"[methods.{name}]"
    exists = method.placebo_of in ("", *p.methods) and method.placebo_of != name
    yield f"{where} placebo_of", exists, "another method", method.placebo_of
    foreign = [name for name in method.settings if name in _OF_THE_STUDY]
    expected = "no setting that belongs in [run] or [tasks]"
    yield f"{where} settings", not foreign, expected, ", ".join(foreign)
    has_rate = "learning_rate" in method.settings.get("optimizer", {})
    expected = "no learning rate, which the grid gives"
    yield f"{where} settings", not has_rate, expected, "optimizer.learning_rate"


def _task_requirements(p: Protocol, name: str, task: Task) -> Iterator[Requirement]:
    """Yields the requirements of one task of the protocol ``p``."""
    check_ranges(task, f"[tasks.{name}] ")
    where = f"[tasks.{name}] accuracy_items"
    count = task.accuracy_items
    config = p.config(p.models[0], name, p.baseline, p.rates[0], 0)
    subject = subject_of(config)
    yield where, not (count and subject.accuracy_items), subject.accuracy_items, count
    where = f"[tasks.{name}] data train_limit"
    limit = config.data.train_limit
    yield where, not (limit and subject.same_examples), subject.same_examples, limit
