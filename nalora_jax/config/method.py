"""Settings of the adapters and the inner optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nalora_jax.config.documented import documented


@documented
@dataclass(frozen=True)
class LoRARule:
    """An ordered rule: a projection's adapter is set by the first rule that matches its path."""

    # Regular expression, searched in paths such as "layers/3/ffn/gate_proj".
    pattern: str
    # Rank r of the adapter; with 0 the matched projections get no adapter.
    rank: int = 8
    # Alpha: the residual's scale is alpha / rank, with rsLoRA alpha / sqrt(rank). None: 2 * rank.
    alpha: float | None = None


@documented
@dataclass(frozen=True)
class LoRAConfig:
    """The projections that get adapters, and the kind of adapter."""

    # Ordered rules: the first match wins, unmatched projections stay frozen, unused rules are errors.
    rules: tuple[LoRARule, ...] = (LoRARule("ffn/(gate|up|down|in|out)_proj"),)
    # Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732) instead of alpha / rank.
    rslora: bool = False
    # Weight-decomposed adapters (DoRA, arXiv 2402.09353): a trained magnitude per output channel.
    dora: bool = False
    # Initialization: "default" (A uniform as in PEFT, B zero), "pissa" (principal components,
    # arXiv 2404.02948), "lora_ga" (singular vectors of the kernel's gradient on the first batches
    # in A and B, arXiv 2407.05000), "gradient" (A the directions in which that gradient is largest,
    # B zero), or "zero_a" (A zero, B Gaussian with the standard deviation of the default's A).
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
class OptimizerConfig:
    """The inner optimizer and its schedule."""

    # "adamw", "adam", "sgd", "lion" or "adafactor".
    name: Literal["adamw", "adam", "sgd", "lion", "adafactor"] = "adamw"
    # Peak learning rate; 0, "auto" on the command line: 4e-3 on SmolLM2-135M; lower on wider
    # models, with an alpha above 16 and with non-zero initializations, higher with AdaLoRA.
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
