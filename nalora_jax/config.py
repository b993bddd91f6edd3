"""A run's settings: frozen dataclasses, one comment per field, every default stated once, here.

The command line (``train.py``, ``nalora train``) is generated from these classes, comments included; an experiment in
``configs/`` is a Python file whose ``config()`` returns a `RunConfig` that differs from the defaults where it says so.
The defaults are the main job: SmolLM2-135M-Instruct on SocialIQA, on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nalora_jax.errors import NaloraError


@dataclass(frozen=True)
class LoRARule:
    """One ordered rule: the first whose pattern matches a projection's path decides its adapter."""

    # Regular expression, searched in paths such as "layers/3/ffn/gate_proj" or "layers/0/attn/q_proj".
    pattern: str
    # Rank r of the adapter; 0 leaves what it matches unadapted.
    rank: int = 8
    # Alpha: the residual is scaled by alpha / rank, or alpha / sqrt(rank) with rsLoRA. None means 2 * rank.
    alpha: float | None = None


@dataclass(frozen=True)
class LoRAConfig:
    """Which projections get adapters, and which kind."""

    # Ordered rules; the first match wins, an unmatched projection stays frozen, an unused rule is an error.
    rules: tuple[LoRARule, ...] = (LoRARule("ffn/(gate|up|down|in|out)_proj"),)
    # Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732) instead of alpha / rank.
    rslora: bool = False
    # Weight-decomposed adapters (DoRA, arXiv 2402.09353): a trained magnitude per output channel.
    dora: bool = False
    # Initialisation: "default" (A uniform as in PEFT, B zero) or "pissa" (principal components, arXiv 2404.02948).
    init: Literal["default", "pissa"] = "default"
    # Dropout rate on the adapters' input, in training only.
    dropout: float = 0.0
    # LoRA+ (arXiv 2402.12354): learning rate of B over that of A.
    plus_ratio: float = 1.0


@dataclass(frozen=True)
class MaskConfig:
    """Mechanism 1: the derivative-based temporal-importance mask of the gate channels."""

    # "off", "hard" (keep the top share of channels) or "soft" (importance over its mean, to a power, clipped).
    kind: Literal["off", "hard", "soft"] = "soft"
    # hard: share of channels kept in each layer, in (0, 1].
    keep: float = 0.5
    # soft: exponent on importance / mean(importance).
    power: float = 2.0
    # soft: lower and upper clip of the mask.
    low: float = 0.0
    high: float = 4.0
    # Decay beta of the importance average.
    decay: float = 0.95
    # Steps before the mask acts.
    warmup: int = 10
    # Also mask the gradient of A through the gate's branch (the update of B's columns is always masked).
    mask_gradient: bool = True


@dataclass(frozen=True)
class StepScaleConfig:
    """Mechanism 2: the activation-specific step scale on the gate channels' updates."""

    # "off", or "homogeneity": the mean over occupied regions of a gain that falls where the coarse degree is low.
    kind: Literal["off", "homogeneity"] = "homogeneity"
    # Gain of the regions inverted, contracting, expanding, linear; normalised to mean 1 over a layer's channels.
    gains: tuple[float, float, float, float] = (0.5, 0.75, 1.0, 1.0)
    # The partition counts as meaningful where two regions of different degree hold at least this share of tokens.
    min_occupancy: float = 0.02
    # Decay of the occupancy average.
    decay: float = 0.95
    # Steps before the scale acts.
    warmup: int = 10


@dataclass(frozen=True)
class OptimizerConfig:
    """The inner optimizer and its schedule."""

    # "adamw", "adam", "sgd", "lion" or "adafactor".
    name: Literal["adamw", "adam", "sgd", "lion", "adafactor"] = "adamw"
    # Peak learning rate.
    learning_rate: float = 1e-3
    # "cosine", "linear" or "constant", after a linear warm-up.
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    # Share of the steps spent warming up.
    warmup_share: float = 0.05
    # Learning rate at the end over its peak.
    final_ratio: float = 0.1
    # Decoupled weight decay.
    weight_decay: float = 0.0
    # Adam's b1, b2 and eps.
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    # Global-norm clip of the gradient; 0 turns it off.
    clip_norm: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """What to train and evaluate on, and how text becomes rows."""

    # A task of this library ("socialiqa", ...), "tfds:<name>", or the path of a JSONL file.
    dataset: str = "socialiqa"
    # TFDS folder that holds (or receives) a "tfds:" data set; empty means TFDS's own default.
    data_dir: str = ""
    # Split to train on (TFDS split expressions work, e.g. "train[:10%]"); a JSONL file has one split, "train".
    train_split: str = "train"
    # Split held out for evaluation. For JSONL: another file's path, or a slice such as "train[-5%:]".
    eval_split: str = "validation"
    # Held-out examples that before and after are measured on (0: all that are left), drawn once by a fixed seed.
    eval_limit: int = 400
    # Other held-out examples, measured along the way, which choose the checkpoint that is exported.
    select_limit: int = 200
    # Tokens per row.
    max_length: int = 128
    # Pack several examples into one row (they never attend to each other); off: one example a row.
    pack: bool = True
    # Examples longer than max_length: "error", "drop" or "truncate" (from the left of the prompt).
    too_long: Literal["error", "drop", "truncate"] = "drop"
    # Tokens that count in the loss: the "answer" (completion or last assistant turn), every "assistant" turn, "all".
    loss_on: Literal["answer", "assistant", "all"] = "answer"
    # Wrap prompts in the model's chat template.
    chat: bool = False
    # Fields of a record: prompt and completion, or one field "messages" of chat turns.
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str = "messages"
    # Examples trained on at most (0: all), the first after the shuffle.
    train_limit: int = 0
    # Threads that put rows together ahead of the step; 0 does it in the step's own thread.
    workers: int = 1


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one axis may be -1 (whatever is left)."""

    # Batch is split, weights are replicated.
    data: int = -1
    # Batch is split, weights are split too (gathered layer by layer).
    fsdp: int = 1
    # Heads and FFN channels are split.
    tensor: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """Batch, intervals and checkpoints."""

    # Rows per optimizer step over all devices.
    batch_size: int = 8
    # Micro-batches that each step accumulates over; batch_size is split into them.
    accumulate: int = 1
    # Steps between log lines, evaluations and checkpoints; 0 turns evaluation or checkpoints during training off.
    log_every: int = 10
    eval_every: int = 50
    save_every: int = 50
    # Checkpoints kept besides the best one.
    keep: int = 2
    # Patience: stop after this many evaluations without a better metric (0: never).
    patience: int = 0


@dataclass(frozen=True)
class ComputeConfig:
    """Numerics and memory."""

    # Dtype of base weights and matrix operands; adapters, sums and norms stay float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # Hold the adapted model's projections quantized (QLoRA): "int8", "nf4" (4 bits), or "none".
    quantize: Literal["none", "int8", "nf4"] = "none"
    # Rematerialisation: "auto" (by platform and dtype, as measured), "none", "full", "dots" (keep what takes a matmul).
    remat: Literal["auto", "none", "full", "dots"] = "auto"
    # Take the channel statistics on one in n positions of each row (1: on all).
    stats_stride: int = 4
    # Take the misalignment probe on one in n positions.
    probe_stride: int = 8
    # Rows of hidden states per chunk of the cross-entropy; 0 chooses by the vocabulary's size.
    loss_chunk: int = 0
    # Keep compiled programs in the cache folder, so that the next start skips compilation.
    compilation_cache: bool = True


@dataclass(frozen=True)
class DebugConfig:
    """Checks that cost time."""

    # Check the gate-compensation identity on the live model in every step (chexify); raises with the layer's error.
    check_gates: bool = False
    # Tolerance of that check, relative to the largest gate output.
    tolerance: float = 1e-4


@dataclass(frozen=True)
class RunConfig:
    """Everything one fine-tuning run needs; the defaults are the main job of the README."""

    # An alias ("smollm2-135m-instruct"), a Hugging Face id, a folder with safetensors, or a .gguf file.
    model: str = "smollm2-135m-instruct"
    # Folder of the run: checkpoints, adapter, metrics.jsonl, report.html. Must be new, or this run's own with --resume.
    output: str = "runs/default"
    # Continue the run in `output` exactly where its last checkpoint left it.
    resume: bool = False
    # Optimizer steps.
    steps: int = 100
    # Seed of adapters, data order and dropout.
    seed: int = 0
    # Also write TensorBoard event files.
    tensorboard: bool = False

    lora: LoRAConfig = field(default_factory=LoRAConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    step_scale: StepScaleConfig = field(default_factory=StepScaleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, for JSON and the checkpoint's fingerprint."""
        return dataclasses.asdict(self)


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The config whose `RunConfig.to_dict` is ``values``, also after JSON has made its tuples lists.

    Fields that this version does not know are ignored, and fields that are missing have their defaults, so that logs of
    other versions can be read.
    """
    groups = {}
    for one in dataclasses.fields(RunConfig):
        if one.name not in values:
            continue
        found = values[one.name]
        if isinstance(one.default_factory, type):  # a nested dataclass
            known = {name.name for name in dataclasses.fields(one.default_factory)}
            inner = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if name in known}
            if one.name == "lora" and "rules" in inner:
                inner["rules"] = tuple(LoRARule(**rule) for rule in inner["rules"])
            found = one.default_factory(**inner)
        groups[one.name] = found
    return RunConfig(**groups)


def check(config: RunConfig) -> RunConfig:
    """``config`` itself, once every field that can be judged without data is in range.

    Raises:
      NaloraError: names the flag, what was expected and what was found.
    """
    positive = {
        "--steps": config.steps,
        "--train.batch-size": config.train.batch_size,
        "--train.accumulate": config.train.accumulate,
        "--train.log-every": config.train.log_every,
        "--data.max-length": config.data.max_length,
        "--compute.stats-stride": config.compute.stats_stride,
        "--compute.probe-stride": config.compute.probe_stride,
        "--data.select-limit": config.data.select_limit,
    }
    for flag, value in positive.items():
        _require(flag, value >= 1, "at least 1", value)
    counts = {
        "--train.eval-every": config.train.eval_every,
        "--train.save-every": config.train.save_every,
        "--train.keep": config.train.keep,
        "--train.patience": config.train.patience,
        "--data.eval-limit": config.data.eval_limit,
        "--compute.loss-chunk": config.compute.loss_chunk,
        "--data.train-limit": config.data.train_limit,
        "--data.workers": config.data.workers,
        "--mask.warmup": config.mask.warmup,
        "--step-scale.warmup": config.step_scale.warmup,
    }
    for flag, value in counts.items():
        _require(flag, value >= 0, "0 or more", value)
    shares = {
        "--mask.decay": config.mask.decay,
        "--step-scale.decay": config.step_scale.decay,
        "--lora.dropout": config.lora.dropout,
        "--optimizer.b1": config.optimizer.b1,
        "--optimizer.b2": config.optimizer.b2,
    }
    for flag, share in shares.items():
        _require(flag, 0 <= share < 1, "a number in [0, 1)", share)
    _require("--mask.keep", 0 < config.mask.keep <= 1, "a share in (0, 1]", config.mask.keep)
    _require("--mask.low", 0 <= config.mask.low < 1, "a number in [0, 1)", config.mask.low)
    _require("--mask.high", config.mask.high > 1, "a number above 1", config.mask.high)
    _require("--mask.power", config.mask.power > 0, "a number above 0", config.mask.power)
    gains = config.step_scale.gains
    _require("--step-scale.gains", min(gains) >= 0 and max(gains) > 0, "four gains, none below 0, not all 0", gains)
    share = config.step_scale.min_occupancy
    _require("--step-scale.min-occupancy", 0 <= share < 0.5, "a share in [0, 0.5)", share)
    rate = config.optimizer.learning_rate
    _require("--optimizer.learning-rate", math.isfinite(rate) and rate > 0, "a finite number above 0", rate)
    amounts = {
        "--optimizer.weight-decay": config.optimizer.weight_decay,
        "--optimizer.clip-norm": config.optimizer.clip_norm,
        "--optimizer.warmup-share": config.optimizer.warmup_share,
        "--optimizer.final-ratio": config.optimizer.final_ratio,
    }
    for flag, amount in amounts.items():
        _require(flag, math.isfinite(amount) and amount >= 0, "a finite number, 0 or more", amount)
    _require("--optimizer.warmup-share", config.optimizer.warmup_share <= 1, "a share", config.optimizer.warmup_share)
    _require("--optimizer.eps", config.optimizer.eps > 0, "a number above 0", config.optimizer.eps)
    _require("--debug.tolerance", config.debug.tolerance > 0, "a number above 0", config.debug.tolerance)
    _require("--lora.plus-ratio", config.lora.plus_ratio > 0, "a number above 0", config.lora.plus_ratio)
    _require("--lora.rules", bool(config.lora.rules), "at least one rule", "none")
    for rule in config.lora.rules:
        _require("--lora.rules", rule.rank >= 0, "a rank of 0 or more", f"{rule.pattern}:{rule.rank}")
        alpha = rule.alpha
        scale = alpha is None or (math.isfinite(alpha) and alpha > 0)
        _require("--lora.rules", scale, "a finite alpha above 0", f"{rule.pattern}:{rule.rank}:{alpha}")
    both = config.compute.quantize != "none" and config.lora.init == "pissa"
    _require("--compute.quantize", not both, 'none with --lora.init "pissa"', config.compute.quantize)
    accumulate, batch = config.train.accumulate, config.train.batch_size
    _require("--train.batch-size", batch % accumulate == 0, f"a multiple of --train.accumulate ({accumulate})", batch)
    return config


def _require(flag: str, holds: bool, expected: str, found: object) -> None:
    if not holds:
        raise NaloraError(flag, expected=expected, found=found)
