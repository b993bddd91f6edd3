"""Settings of the adapters, the two mechanisms, and the inner optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nalora_jax.config.documented import documented


@documented
@dataclass(frozen=True)
class LoRARule:
    """An ordered rule: a projection's adapter is set by the first rule that matches its path."""

    # Regular expression, searched in paths such as "layers/3/ffn/gate_proj" or "layers/0/attn/q_proj".
    pattern: str
    # Rank r of the adapter; with 0 the matched projections get no adapter.
    rank: int = 8
    # Alpha: the residual is scaled by alpha / rank, or alpha / sqrt(rank) with rsLoRA. None means 2 * rank.
    alpha: float | None = None


@documented
@dataclass(frozen=True)
class LoRAConfig:
    """The projections that get adapters, and the kind of adapter."""

    # Ordered rules; the first match wins, an unmatched projection stays frozen, an unused rule is an error.
    rules: tuple[LoRARule, ...] = (LoRARule("ffn/(gate|up|down|in|out)_proj"),)
    # Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732) instead of alpha / rank.
    rslora: bool = False
    # Weight-decomposed adapters (DoRA, arXiv 2402.09353): a trained magnitude per output channel.
    dora: bool = False
    # Initialization: "default" (A uniform as in PEFT, B zero), "pissa" (principal components,
    # arXiv 2404.02948), "lora_ga" (singular vectors of the kernel's gradient on the first batches
    # in A and B, arXiv 2407.05000), "gradient" (A the directions in which that gradient is largest, B
    # zero), or "zero_a" (A zero, B Gaussian with the standard deviation of the default's A).
    init: Literal["default", "pissa", "lora_ga", "gradient", "zero_a"] = "default"
    # lora_ga, gradient: batches on which the gradient is computed, each read five times: with 4,
    # the time of 20 steps.
    gradient_batches: int = 4
    # gradient: weight of the gate's output channels: "ones", their "slope", or the slopes
    # "permuted" (the permutation control).
    gradient_weights: Literal["ones", "slope", "permuted"] = "ones"
    # Also train the complete token embedding and output head, as PEFT's modules_to_save does: each
    # takes three times the memory of its table in float32. In a model with tied embeddings they
    # become separate tables.
    modules_to_save: tuple[Literal["embed_tokens", "lm_head"], ...] = ()
    # Train only the rows of these token ids, as PEFT's trainable_token_indices does; all other
    # rows stay the base's.
    trainable_token_indices: tuple[int, ...] = ()
    # Tables with trained rows. In a model with tied embeddings the head shares the embedding's
    # rows; otherwise it stays frozen unless it is named too.
    trainable_token_modules: tuple[Literal["embed_tokens", "lm_head"], ...] = ("embed_tokens",)
    # Dropout rate on the adapters' input, in training only.
    dropout: float = 0.0
    # LoRA+ (arXiv 2402.12354): ratio of the learning rates of B and A.
    plus_ratio: float = 1.0


@documented
@dataclass(frozen=True)
class MaskConfig:
    """Mechanism 1: the derivative-based temporal-importance mask of the gate channels."""

    # "off", "hard" (keep the top share of channels) or "soft" (importance over its mean, to a power, clipped).
    kind: Literal["off", "hard", "soft"] = "off"
    # hard: share of channels kept in each layer, in (0, 1].
    keep: float = 0.5
    # soft: exponent on importance / mean(importance).
    power: float = 2.0
    # soft: lower clip of the mask.
    low: float = 0.0
    # soft: upper clip of the mask.
    high: float = 4.0
    # Decay beta of the EMA of the importance.
    decay: float = 0.95
    # Steps before the mask acts.
    warmup: int = 10
    # Also mask the gradient of A through the gate's branch (the update of B's columns is always masked).
    mask_gradient: bool = True
    # Measured steps after which the importance is frozen (1: after one calibration batch); 0:
    # never.
    frozen_after: int = 0
    # Permutation control: seed of a permutation of the mask over each layer's channels, fixed in a
    # run; -1: none.
    permute: int = -1


@documented
@dataclass(frozen=True)
class StepScaleConfig:
    """Mechanism 2: the activation-specific step scale on the gate channels' updates."""

    # "off"; "curvature": shorter steps for channels whose adapter has left the linear range; or
    # "homogeneity": the mean over occupied regions of a gain that is smaller at a low coarse
    # degree.
    kind: Literal["off", "curvature", "homogeneity"] = "curvature"
    # curvature: tau, the largest nonlinear share of a channel's response to its adapter that keeps full steps.
    tau: float = 0.1
    # homogeneity: gain of the regions inverted, contracting, expanding, linear; only their ratios
    # matter.
    gains: tuple[float, float, float, float] = (0.5, 0.75, 1.0, 1.0)
    # homogeneity: smallest share of tokens that two regions of different degree must each have for
    # the partition to be used.
    min_occupancy: float = 0.02
    # Decay of the EMAs from which the scale is computed.
    decay: float = 0.95
    # Steps before the scale acts.
    warmup: int = 10
    # Measured steps after which these EMAs are frozen; 0: never.
    frozen_after: int = 0
    # Permutation control: seed of a permutation of the scale over each layer's channels, fixed in
    # a run; -1: none.
    permute: int = -1


@documented
@dataclass(frozen=True)
class OptimizerConfig:
    """The inner optimizer and its schedule."""

    # "adamw", "adam", "sgd", "lion" or "adafactor".
    name: Literal["adamw", "adam", "sgd", "lion", "adafactor"] = "adamw"
    # Peak learning rate; 0, "auto" on the command line: 4e-3 on SmolLM2-135M; lower on wider
    # models and with non-zero initializations, higher with AdaLoRA.
    learning_rate: float = 0.0
    # "cosine", "linear" or "constant", after a linear warm-up.
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    # Learning rate of some adapters relative to the others: (pattern, factor) pairs, the first
    # match wins, e.g. ffn/gate_proj 2. Patterns are searched in paths such as
    # "layers/ffn/gate_proj"; an unused pattern is an error.
    rates: tuple[tuple[str, float], ...] = ()
    # Share of the steps spent warming up.
    warmup_share: float = 0.05
    # Steps spent warming up, in place of the share; 0: the share decides.
    warmup_steps: int = 0
    # Start the warm-up at a learning rate of 0, as transformers does; the first step then has no
    # effect.
    warmup_from_zero: bool = False
    # Learning rate at the end divided by its peak.
    final_ratio: float = 0.1
    # Decoupled weight decay.
    weight_decay: float = 0.0
    # Adam's b1, the decay of its EMA of gradients (lion's too).
    b1: float = 0.9
    # Adam's b2, the decay of its EMA of squared gradients (lion's too).
    b2: float = 0.999
    # Adam's eps, added to the root of the EMA of squares.
    eps: float = 1e-8
    # Global-norm clip of the gradient; 0 turns it off.
    clip_norm: float = 1.0
