"""A run's settings: frozen dataclasses that define every default and comment every field.

The command line (``train.py``, ``nalora train``) is generated from these classes, including the
comments. An experiment in ``configs/`` is a Python file whose ``config()`` returns a `RunConfig`
that sets only the values that differ from the defaults. The defaults are the main job:
SmolLM2-135M-Instruct on SocialIQA, on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import arg

from nalora_jax.config.adalora import AdaLoRAConfig, check_adalora
from nalora_jax.config.data import DataConfig, check_data
from nalora_jax.config.documented import documented
from nalora_jax.config.former import translated
from nalora_jax.config.machine import ComputeConfig, MeshConfig, Remat
from nalora_jax.config.method import LoRAConfig, LoRARule, OptimizerConfig
from nalora_jax.config.preference import UNCHANGED, PreferenceConfig, check_preference
from nalora_jax.config.ranges import (
    ALPHA,
    BELOW_ONE,
    COUNT,
    GAIN,
    INTERVAL,
    LENGTH,
    MESH,
    RANK,
    ROWS,
    SEED,
    SHARE,
    SIZE,
    Range,
    check_path,
    check_ranges,
    require,
)
from nalora_jax.config.rope_scaling import FLAG as ROPE_SCALING
from nalora_jax.config.rope_scaling import parse_rope_scaling
from nalora_jax.config.types import WrongType, first_wrong, first_wrong_part, type_name
from nalora_jax.config.vision import VisionConfig, check_vision
from nalora_jax.errors import NaloraError

__all__ = [
    "RANGES",
    "AdaLoRAConfig",
    "ComputeConfig",
    "DataConfig",
    "DebugConfig",
    "LoRAConfig",
    "LoRARule",
    "MeshConfig",
    "OptimizerConfig",
    "PreferenceConfig",
    "Remat",
    "RunConfig",
    "TrainConfig",
    "VisionConfig",
    "check",
    "config_from_dict",
]


@documented
@dataclass(frozen=True)
class TrainConfig:
    """Batch, intervals and checkpoints."""

    # Packed sequences (examples of image tasks) per optimizer step over all devices.
    batch_size: int = 8
    # Micro-batches per step; batch_size is split into them and their gradients are accumulated.
    accumulate: int = 1
    # Steps between log lines.
    log_every: int = 10
    # Steps between evaluations; -1: 50, or half of a run below 100 steps; 0: none during training.
    eval_every: int = -1
    # Steps between checkpoints; 0 turns checkpoints during training off.
    save_every: int = 50
    # Checkpoints to keep in addition to the best one.
    keep: int = 2
    # Patience: stop after this many evaluations without a better metric (0: never).
    patience: int = 0


@documented
@dataclass(frozen=True)
class DebugConfig:
    """Expensive checks and measurements."""

    # Check the gates of the live model in every step, channel by channel (chexify): the
    # pre-activation, the gate-compensation identity, Activation.gate against rho and its
    # derivative, and the input of the down projection.
    check_gates: bool = False
    # Tolerance of that check, relative to |F| + |S|; bfloat16 rounding is allowed in addition.
    tolerance: float = 1e-4
    # Write an xprof trace of STEPS steps starting at step START, as START:STEPS, to `profile` in
    # the output folder.
    profile: str = ""

    @property
    def profiled(self) -> range:
        """Range of the steps that `profile` names, which must be well formed; empty without it."""
        first, _, count = self.profile.partition(":")
        if self.profile:
            return range(int(first), int(first) + int(count))
        return range(0)


@documented
@dataclass(frozen=True)
class RunConfig:
    """All settings of one fine-tuning run; the defaults are the main job of the README."""

    # An alias ("smollm2-135m-instruct"), a Hugging Face id, a folder with safetensors, or a .gguf
    # file; also their URL.
    model: str = "smollm2-135m-instruct"
    # RoPE scaling in place of the model's, for rows beyond its context, as TYPE:field=value,... with the types and
    # fields of transformers: "yarn:factor=4", "linear:factor=2", "dynamic:factor=2", "llama3:factor=16".
    rope_scaling: Annotated[str, arg(name="model.rope-scaling")] = ""
    # Adapter to continue: the folder of a run, or of an adapter in PEFT's format. The run starts from
    # its values and has its base model, ranks, alphas, variant and trained tables.
    adapter: str = ""
    # SHA-256 of that adapter's tensors; recorded with the run, and checked if it is set.
    adapter_sha256: str = ""
    # Folder of the run: checkpoints, adapter, metrics.jsonl, report.html. Must be new, or the same
    # run's with --resume.
    output: str = "runs/default"
    # Resume the run in `output` from its last checkpoint, with its recorded settings; "auto": if
    # there is one. On the command line --resume FOLDER names the run too.
    resume: bool | Literal["auto"] = False
    # Optimizer steps.
    steps: int = 100
    # Passes over the data, in place of steps; 0: `steps` decides.
    epochs: float = 0.0
    # Seed of adapters, data order and dropout.
    seed: int = 0
    # Further outputs of the log: NAME or NAME:setting=value,... of tensorboard, wandb, mlflow
    # (docs/quick_start.md).
    callbacks: tuple[str, ...] = ()
    # Rules that weigh the gates' gradients and updates, in this order: NAME or
    # NAME:setting=value,... (docs/method.md lists them); "none" on the command line: plain LoRA.
    # "soft:power=2 homogeneity" are the mask and the step scale of the paper's abstract.
    mechanisms: tuple[str, ...] = ("curvature_cap",)
    # Python files that are executed first, to register your rules, activations, families or
    # sources; recorded with their digests. Use only files that you trust. On the command line
    # --import FILE ..., with any command.
    imports: tuple[str, ...] = ()

    lora: LoRAConfig = field(default_factory=LoRAConfig)
    adalora: AdaLoRAConfig = field(default_factory=AdaLoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain dicts, for JSON and the checkpoint's fingerprint."""
        return dataclasses.asdict(self)

    def without_mechanisms(self) -> RunConfig:
        """Returns the same run as plain LoRA."""
        return dataclasses.replace(self, mechanisms=())


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Returns the config whose `RunConfig.to_dict` is ``values``; lists become tuples.

    Unknown fields are ignored, missing fields have their defaults, and former groups of mechanisms
    become rules, so that logs of other versions can be read.

    Raises:
      AttributeError, TypeError, ValueError: the values have another structure.
    """
    values = translated(values)
    groups: dict[str, Any] = {}
    for entry in dataclasses.fields(RunConfig):
        if entry.name not in values:
            continue
        value = _as_field(values[entry.name])
        if isinstance(entry.default_factory, type):  # a nested dataclass
            inner_names = {name.name for name in dataclasses.fields(entry.default_factory)}
            inner = {name: _as_field(v) for name, v in value.items() if name in inner_names}
            if entry.name == "lora" and "rules" in inner:
                inner["rules"] = tuple(LoRARule(**rule) for rule in inner["rules"])
            if entry.name == "optimizer" and "rates" in inner:
                inner["rates"] = tuple((pattern, factor) for pattern, factor in inner["rates"])
            value = entry.default_factory(**inner)
        groups[entry.name] = value
    return RunConfig(**groups)


def _as_field(value: Any) -> Any:
    """Returns a value of a JSON file with the type of a dataclass field: a tuple for a list."""
    if isinstance(value, list):
        return tuple(value)
    return value


# Range of every numeric setting; adapter rules are checked in `check`.
RANGES = {
    "steps": SIZE,
    "epochs": Range("a number", "[0, 1e6]"),
    "seed": SEED,
    "lora.dropout": BELOW_ONE,
    "lora.plus_ratio": Range("a number", "(0, 1e6]"),
    "lora.gradient_batches": SIZE,
    "adalora.target_rank": RANK,
    "adalora.warmup_share": BELOW_ONE,
    "adalora.final_share": BELOW_ONE,
    "adalora.interval": SIZE,
    "adalora.sensitivity_decay": BELOW_ONE,
    "adalora.uncertainty_decay": BELOW_ONE,
    "adalora.orthogonality": Range("a number", "[0, 1000]"),
    "optimizer.learning_rate": Range("a number", "[0, 1000]"),
    "optimizer.warmup_share": SHARE,
    "optimizer.warmup_steps": COUNT,
    "optimizer.final_ratio": SHARE,
    "optimizer.weight_decay": Range("a number", "[0, 1000]"),
    "optimizer.b1": BELOW_ONE,
    "optimizer.b2": BELOW_ONE,
    "optimizer.eps": Range("a number", "(0, 1]"),
    "optimizer.clip_norm": Range("a number", "[0, 1e9]"),
    "data.eval_limit": COUNT,
    "data.select_limit": SIZE,
    "data.max_length": LENGTH,
    "data.loss_last": Range("a number", "[0, 1e9]"),
    "data.train_limit": COUNT,
    "data.workers": Range("a whole number", "[0, 1024]"),
    **MESH,
    "train.batch_size": ROWS,
    "train.accumulate": ROWS,
    "train.log_every": SIZE,
    "train.eval_every": INTERVAL,
    "train.save_every": COUNT,
    "train.keep": COUNT,
    "train.patience": COUNT,
    "compute.stats_stride": SIZE,
    "compute.stats_positions": COUNT,
    "compute.probe_stride": SIZE,
    "compute.loss_chunk": COUNT,
    "debug.tolerance": Range("a number", "(0, 1]"),
    "preference.beta": Range("a number", "(0, 1000]"),
    "preference.label_smoothing": Range("a share", "[0, 0.5)"),
    "vision.shots": COUNT,
    "vision.crop_area": Range("a share", "(0, 1]"),
    "vision.max_pixels": SIZE,
    "vision.image_size": Range("a whole number", "[0, 65536]"),
    "vision.caption_length": COUNT,
    "vision.features": Range("a whole number", "[0, 65536]"),
}


def check(config: RunConfig) -> RunConfig:
    """Returns ``config`` after checking every field that can be checked without data.

    Raises:
      NaloraError: names the flag, the expected value and the actual one.
    """
    if not isinstance(config, RunConfig):
        remedy = "RunConfig(steps=100, lora=LoRAConfig(...)); config_from_dict makes one of nested dicts"
        raise NaloraError(
            "config", expected="a RunConfig", found=f"a {type(config).__name__}", remedy=remedy
        )
    _check_type(first_wrong_part(config))
    check_ranges(config, RANGES)
    _check_type(first_wrong(config, lenient=True))
    _check_rules(config.lora.rules)
    profile = config.debug.profile
    form = r"[1-9]\d{0,8}:[1-9]\d{0,3}"
    require(
        "--debug.profile",
        not profile or re.fullmatch(form, profile) is not None,
        "START:STEPS, as 10:5",
        profile,
    )
    late = bool(profile) and not config.epochs and config.debug.profiled.start > config.steps
    require("--debug.profile", not late, f"a step of the run, which has {config.steps}", profile)
    batch, accumulate = config.train.batch_size, config.train.accumulate
    require(
        "--train.batch-size",
        batch % accumulate == 0,
        f"a multiple of --train.accumulate ({accumulate})",
        batch,
    )
    quantized, init, weights = config.compute.quantize, config.lora.init, config.lora.gradient_weights
    both = quantized != "none" and init in ("pissa", "lora_ga")
    require("--compute.quantize", not both, f'none with --lora.init "{init}"', quantized)
    weighted = init == "lora_ga" and weights != "ones"
    require("--lora.gradient-weights", not weighted, 'ones with --lora.init "lora_ga"', weights)
    for _, factor in config.optimizer.rates:
        require("--optimizer.rates", GAIN.holds(factor), f"factors, each {GAIN}", config.optimizer.rates)
    check_path("--output", config.output)
    check_data(config.data, compares=config.preference.loss != "none")
    if config.rope_scaling:
        parse_rope_scaling(config.rope_scaling)
        task = config.vision.task
        require(ROPE_SCALING, task in ("", "chat"), "a language model", f"--vision.task {task}")
    check_vision(config.vision, accumulate=config.train.accumulate, quantize=config.compute.quantize)
    check_adalora(config)
    _check_saved(config)
    _check_added(config)
    check_preference(config.preference, init=config.lora.init, task=config.vision.task)
    if config.adapter:
        _check_adapter(config)
    return config


def _check_adapter(config: RunConfig) -> None:
    """Checks that the settings leave the adapter's values and ranks as they are."""
    check_path("--adapter", config.adapter)
    for flag, value, fits in (
        ("--lora.init", config.lora.init, "default"),
        ("--adalora.target-rank", config.adalora.target_rank, 0),
        ("--vision.task", config.vision.task.replace("chat", "") or "none", "none"),
    ):
        require(flag, value == fits, f"{fits} with --adapter, whose values the run starts from", value)
    if config.preference.loss != "none":
        raise NaloraError(
            "--preference.loss",
            expected="none with --adapter",
            found=config.preference.loss,
            remedy="its reference is the base without an adapter: merge this one first (nalora merge)",
        )


def _check_type(wrong: WrongType | None) -> None:
    if wrong is not None:
        actual = f"{reprlib.repr(wrong.value)}, a {type(wrong.value).__name__}"
        raise NaloraError(f"RunConfig.{wrong.field}", expected=f"a {type_name(wrong.hint)}", found=actual)


def _check_saved(config: RunConfig) -> None:
    """Checks that initialization and loss support trained tables.

    The initialization must leave the base unchanged.
    """
    lora = config.lora
    ids = lora.trainable_token_indices
    fine = len(set(ids)) == len(ids) and all(map(COUNT.holds, ids))
    require("--lora.trainable-token-indices", fine, f"token ids, each {COUNT}, none named twice", ids)
    named = bool(lora.trainable_token_modules)
    require("--lora.trainable-token-modules", named or not ids, "embed_tokens, lm_head or both", "none")
    both = set(lora.modules_to_save) & set(lora.trainable_token_modules)
    expected = "tables that --lora.modules-to-save does not train as a whole"
    require("--lora.trainable-token-modules", not (ids and both), expected, " ".join(sorted(both)))
    if not (lora.modules_to_save or ids):
        return
    setting = "trainable-token-indices"
    if lora.modules_to_save:
        setting = "modules-to-save"
    init = config.lora.init
    require("--lora.init", init in UNCHANGED, f"{' or '.join(UNCHANGED)} with --lora.{setting}", init)
    for flag, value, fits in (
        ("--vision.task", config.vision.task, ""),
        ("--preference.loss", config.preference.loss, "none"),
    ):
        require(flag, value == fits, f"{fits or 'a language model'} with --lora.{setting}", value)


def _check_added(config: RunConfig) -> None:
    """Checks that rows of added tokens are trained in both tables, since both are new to the base.

    The tokenizer decides which ids they get, and so whether `trainable_token_indices` contains all
    of them: see `nalora_jax.train.inputs.check_layout`.
    """
    data, saved = config.data, config.lora.modules_to_save
    for flag, texts in (("add-tokens", data.add_tokens), ("add-special-tokens", data.add_special_tokens)):
        fine = all(text.strip() for text in texts) and len(set(texts)) == len(texts)
        require(f"--data.{flag}", fine, "texts, none empty or named twice", ", ".join(map(repr, texts)))
    both = set(data.add_tokens) & set(data.add_special_tokens)
    require(
        "--data.add-tokens",
        not both,
        "no token of --data.add-special-tokens",
        ", ".join(map(repr, sorted(both))),
    )
    if data.add_tokens or data.add_special_tokens:
        trained = {"embed_tokens", "lm_head"} <= set(saved) or bool(config.lora.trainable_token_indices)
        flag, value = "--lora.modules-to-save", " ".join(saved) or "none"
        expected = "embed_tokens lm_head beside added tokens, whose rows are new (or --lora.trainable-token-indices)"
        require(flag, trained, expected, value)


def _check_rules(rules: tuple[LoRARule, ...]) -> None:
    require("--lora.rules", bool(rules), "at least one rule", "none")
    for rule in rules:
        name = f"{rule.pattern}:{rule.rank}"
        require("--lora.rules", RANK.holds(rule.rank), f"a rank that is {RANK}", name)
        scale = rule.alpha is None or ALPHA.holds(rule.alpha)
        require("--lora.rules", scale, f"an alpha that is {ALPHA}", f"{name}:{rule.alpha}")
        try:
            re.compile(rule.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            remedy = f"it is no regular expression: {error}"
            raise NaloraError(
                "--lora.rules", expected="a pattern", found=repr(rule.pattern), remedy=remedy
            ) from None
