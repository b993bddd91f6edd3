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
    # Initialisation: "default" (A uniform as in PEFT, B zero), "pissa" (principal components, arXiv 2404.02948), or
    # "gradient" (A the directions in which the first batches' gradient of the kernel is largest, B zero).
    init: Literal["default", "pissa", "gradient"] = "default"
    # gradient: batches that the gradient is taken on, each read five times: 20 steps' time with 4.
    gradient_batches: int = 4
    # gradient: weight of the gate's output channels: "ones", their "slope", or the slopes "permuted" (its placebo).
    gradient_weights: Literal["ones", "slope", "permuted"] = "ones"
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
    # Measured steps after which importance stays as it is (1: that of one calibration batch); 0: never.
    frozen_after: int = 0
    # Placebo: seed of a permutation of the mask over each layer's channels, fixed in a run; -1: none.
    permute: int = -1


@dataclass(frozen=True)
class StepScaleConfig:
    """Mechanism 2: the activation-specific step scale on the gate channels' updates."""

    # "off", or "homogeneity": the mean over occupied regions of a gain that falls where the coarse degree is low.
    kind: Literal["off", "homogeneity"] = "homogeneity"
    # Gain of the regions inverted, contracting, expanding, linear; their scale does not matter.
    gains: tuple[float, float, float, float] = (0.5, 0.75, 1.0, 1.0)
    # The partition counts as meaningful where two regions of different degree hold at least this share of tokens.
    min_occupancy: float = 0.02
    # Decay of the occupancy average.
    decay: float = 0.95
    # Steps before the scale acts.
    warmup: int = 10
    # Measured steps after which the occupancies stay as they are; 0: never.
    frozen_after: int = 0
    # Placebo: seed of a permutation of the scale over each layer's channels, fixed in a run; -1: none.
    permute: int = -1


@dataclass(frozen=True)
class OptimizerConfig:
    """The inner optimizer and its schedule."""

    # "adamw", "adam", "sgd", "lion" or "adafactor".
    name: Literal["adamw", "adam", "sgd", "lion", "adafactor"] = "adamw"
    # Peak learning rate.
    learning_rate: float = 1e-3
    # "cosine", "linear" or "constant", after a linear warm-up.
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    # Learning rate of some adapters over that of the others: (pattern, factor) pairs, the first match wins, e.g.
    # ffn/gate_proj 2. Patterns are searched in paths such as "layers/ffn/gate_proj"; an unused one is an error.
    rates: tuple[tuple[str, float], ...] = ()
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
    """Devices along each axis of the mesh: 0 leaves an axis to the library (``--mesh auto``), -1 takes what is left.

    What is left to it is chosen by roofline, together with ``compute.remat``: the fastest that fits.
    """

    # Batch is split, weights are replicated.
    data: int = 0
    # Batch is split, weights are split too (gathered layer by layer).
    fsdp: int = 0
    # Heads and FFN channels are split.
    tensor: int = 0


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
    # Rematerialisation: "auto" (by platform, as measured), "none", "full", "dots" (keep what takes a matmul), or
    # "attention" (of that, nothing that is d_ff wide).
    remat: Literal["auto", "none", "full", "attention", "dots"] = "auto"
    # Take the channel statistics on one in n positions of each row (1: on all).
    stats_stride: int = 4
    # Take the misalignment probe on one in n positions.
    probe_stride: int = 8
    # Rows of hidden states per chunk of the cross-entropy, on each device; 0 chooses by platform and vocabulary.
    loss_chunk: int = 0
    # Keep compiled programs in the cache folder, so that the next start skips compilation.
    compilation_cache: bool = True


@dataclass(frozen=True)
class DebugConfig:
    """Checks that cost time."""

    # Check the gates of the live model in every step, channel by channel (chexify): the gate-compensation identity,
    # Activation.gate against rho and its derivative, and what the block multiplies by what they say.
    check_gates: bool = False
    # Tolerance of that check, relative to |F| + |S|; rounding of what is held in bf16 is allowed on top.
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
    # Mechanisms beside the mask and the step scale: NAME or NAME:setting=value,... (docs/method.md lists them).
    mechanisms: tuple[str, ...] = ()

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
    groups: dict[str, Any] = {}
    for one in dataclasses.fields(RunConfig):
        if one.name not in values:
            continue
        found: Any = values[one.name]
        found = tuple(found) if isinstance(found, list) else found
        if isinstance(one.default_factory, type):  # a nested dataclass
            known = {name.name for name in dataclasses.fields(one.default_factory)}
            inner = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if name in known}
            if one.name == "lora" and "rules" in inner:
                inner["rules"] = tuple(LoRARule(**rule) for rule in inner["rules"])
            if one.name == "optimizer" and "rates" in inner:
                inner["rates"] = tuple((pattern, factor) for pattern, factor in inner["rates"])
            found = one.default_factory(**inner)
        groups[one.name] = found
    return RunConfig(**groups)


def check(config: RunConfig) -> RunConfig:
    """``config`` itself, once every field that can be judged without data is in range.

    Raises:
      NaloraError: names the flag, what was expected and what was found.
    """
    _at_least(1, {"--steps": config.steps})
    _check_lora(config.lora)
    _check_mask(config.mask)
    _check_step_scale(config.step_scale)
    _check_optimizer(config.optimizer)
    _check_data(config.data)
    _check_train(config.train)
    _check_compute(config.compute)
    _above(0, {"--debug.tolerance": config.debug.tolerance})
    both = config.compute.quantize != "none" and config.lora.init == "pissa"
    _require("--compute.quantize", not both, 'none with --lora.init "pissa"', config.compute.quantize)
    return config


def _check_lora(lora: LoRAConfig) -> None:
    _fractions({"--lora.dropout": lora.dropout})
    _above(0, {"--lora.plus-ratio": lora.plus_ratio})
    _at_least(1, {"--lora.gradient-batches": lora.gradient_batches})
    _require("--lora.rules", bool(lora.rules), "at least one rule", "none")
    for rule in lora.rules:
        name, alpha = f"{rule.pattern}:{rule.rank}", rule.alpha
        _require("--lora.rules", rule.rank >= 0, "a rank of 0 or more", name)
        scale = alpha is None or (math.isfinite(alpha) and alpha > 0)
        _require("--lora.rules", scale, "a finite alpha above 0", f"{name}:{alpha}")


def _check_mask(mask: MaskConfig) -> None:
    _at_least(0, {"--mask.warmup": mask.warmup, "--mask.frozen-after": mask.frozen_after})
    _at_least(-1, {"--mask.permute": mask.permute})
    _fractions({"--mask.decay": mask.decay, "--mask.low": mask.low})
    _require("--mask.keep", 0 < mask.keep <= 1, "a share in (0, 1]", mask.keep)
    _above(1, {"--mask.high": mask.high})
    _above(0, {"--mask.power": mask.power})


def _check_step_scale(step_scale: StepScaleConfig) -> None:
    _at_least(0, {"--step-scale.warmup": step_scale.warmup, "--step-scale.frozen-after": step_scale.frozen_after})
    _at_least(-1, {"--step-scale.permute": step_scale.permute})
    _fractions({"--step-scale.decay": step_scale.decay})
    gains, share = step_scale.gains, step_scale.min_occupancy
    _require("--step-scale.gains", min(gains) >= 0 and max(gains) > 0, "four gains, none below 0, not all 0", gains)
    _require("--step-scale.min-occupancy", 0 <= share < 0.5, "a share in [0, 0.5)", share)


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    rate = optimizer.learning_rate
    _require("--optimizer.learning-rate", math.isfinite(rate) and rate > 0, "a finite number above 0", rate)
    factors = all(math.isfinite(factor) and factor >= 0 for _, factor in optimizer.rates)
    _require("--optimizer.rates", factors, "finite factors, 0 or more", optimizer.rates)
    amounts = {
        "--optimizer.weight-decay": optimizer.weight_decay,
        "--optimizer.clip-norm": optimizer.clip_norm,
        "--optimizer.warmup-share": optimizer.warmup_share,
        "--optimizer.final-ratio": optimizer.final_ratio,
    }
    for flag, amount in amounts.items():
        _require(flag, math.isfinite(amount) and amount >= 0, "a finite number, 0 or more", amount)
    _require("--optimizer.warmup-share", optimizer.warmup_share <= 1, "a share", optimizer.warmup_share)
    _fractions({"--optimizer.b1": optimizer.b1, "--optimizer.b2": optimizer.b2})
    _above(0, {"--optimizer.eps": optimizer.eps})


def _check_data(data: DataConfig) -> None:
    _at_least(1, {"--data.max-length": data.max_length, "--data.select-limit": data.select_limit})
    limits = {"--data.eval-limit": data.eval_limit, "--data.train-limit": data.train_limit}
    _at_least(0, limits | {"--data.workers": data.workers})


def _check_train(train: TrainConfig) -> None:
    batch, accumulate = train.batch_size, train.accumulate
    _at_least(
        1,
        {"--train.batch-size": batch, "--train.accumulate": accumulate, "--train.log-every": train.log_every},
    )
    _at_least(
        0,
        {
            "--train.eval-every": train.eval_every,
            "--train.save-every": train.save_every,
            "--train.keep": train.keep,
            "--train.patience": train.patience,
        },
    )
    _require("--train.batch-size", batch % accumulate == 0, f"a multiple of --train.accumulate ({accumulate})", batch)


def _check_compute(compute: ComputeConfig) -> None:
    _at_least(1, {"--compute.stats-stride": compute.stats_stride, "--compute.probe-stride": compute.probe_stride})
    _at_least(0, {"--compute.loss-chunk": compute.loss_chunk})


_NUMBERS = {0: "0 or more", -1: "0 or more, or -1"}


def _at_least(least: int, counts: Mapping[str, int]) -> None:
    for flag, count in counts.items():
        _require(
            flag,
            count >= least,
            _NUMBERS.get(least, f"at least {least}"),
            count,
        )


def _above(limit: int, amounts: Mapping[str, float]) -> None:
    for flag, amount in amounts.items():
        _require(flag, amount > limit, f"a number above {limit}", amount)


def _fractions(shares: Mapping[str, float]) -> None:
    for flag, share in shares.items():
        _require(flag, 0 <= share < 1, "a number in [0, 1)", share)


def _require(flag: str, holds: bool, expected: str, found: object) -> None:
    if not holds:
        raise NaloraError(flag, expected=expected, found=found)
