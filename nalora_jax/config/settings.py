"""The settings of a run: frozen dataclasses with the default and a comment of every field.

The command line is generated from these classes, including the comments; numbers have their range
in their annotation. The defaults are the main job: SmolLM2-135M-Instruct on SocialIQA, on two CPU
cores.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import arg

from nalora_jax.config.structured import (
    ACCEPTS_AUTO,
    AMOUNT,
    AXIS,
    BELOW_ONE,
    COUNT,
    INTERVAL,
    LENGTH,
    POSITIVE,
    POSITIVE_SHARE,
    RANK,
    ROW_COUNT,
    SEED,
    SHARE_RANGE,
    SIZE,
    TOKEN_COUNT,
    Range,
    parse_dataclass,
)
from nalora_jax.errors import NaloraError

# Values of --lora.init that read no batches and keep the base's weights.
UNCHANGED = ("default", "zero_a")
FULL = "full"  # the value of --tune that trains all weights in place of adapters


@dataclass(frozen=True)
class LoRARule:
    """An ordered rule: a projection's adapter is set by the first rule that matches its path."""

    # Regular expression, searched in paths such as "layers/3/ffn/gate_proj".
    pattern: str
    # Rank r of the adapter; with 0 the matched projections get no adapter.
    rank: Annotated[int, RANK] = 8
    # Alpha: the residual's scale is alpha / rank, with rsLoRA alpha / sqrt(rank). None: 2 * rank.
    alpha: Annotated[float | None, POSITIVE] = None

    @classmethod
    def from_text(cls, text: str) -> LoRARule:
        """Parses a rule as typed on the command line.

        Example:
          >>> LoRARule.from_text("ffn/gate_proj:16")
          LoRARule(pattern='ffn/gate_proj', rank=16, alpha=None)
          >>> LoRARule.from_text("attn:8:32")
          LoRARule(pattern='attn', rank=8, alpha=32.0)

        Raises:
          NaloraError: not of the form PATTERN:RANK[:ALPHA].
        """
        match = re.fullmatch(
            # The pattern may contain colons, as in "(?:q|v)_proj:8": it ends before the first rank.
            r"(?P<pattern>.+?):(?P<rank>\d+)(?::(?P<alpha>[^:]+))?",
            text,
        )
        try:
            if match is None:
                raise ValueError
            alpha = None
            if match["alpha"] is not None:
                alpha = float(match["alpha"])
            return cls(match["pattern"], int(match["rank"]), alpha)
        except ValueError:
            expected = "PATTERN:RANK[:ALPHA], e.g. 'ffn/gate_proj:16'"
            raise NaloraError("rule", expected=expected, found=repr(text)) from None

    @property
    def text(self) -> str:
        """Returns the text that `from_text` reads as this rule."""
        text = f"{self.pattern}:{self.rank}"
        if self.alpha is not None:
            # Nine digits determine a float32.
            text += f":{self.alpha:.9g}"
        return text


@dataclass(frozen=True)
class LoRAConfig:
    """The projections that get adapters, and the kind of adapter."""

    # Ordered rules: the first match wins, unmatched projections stay frozen, unused rules are
    # errors.
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
    gradient_batches: Annotated[int, SIZE] = 4
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
    trainable_token_modules: tuple[Literal["embed_tokens", "lm_head"], ...] = (
        "embed_tokens",
    )
    # Dropout rate on the adapters' input, in training only.
    dropout: Annotated[float, BELOW_ONE] = 0.0
    # LoRA+ (arXiv 2402.12354): ratio of the learning rates of B and A.
    plus_ratio: Annotated[float, POSITIVE] = 1.0


@dataclass(frozen=True)
class AdaLoRAConfig:
    """AdaLoRA (arXiv 2303.10512): adapters start with their rules' ranks and keep the best ones."""

    # Mean rank of the adapters at the end; 0: plain LoRA.
    target_rank: Annotated[int, RANK] = 0
    # Share of the steps before the first rank is removed.
    warmup_share: Annotated[float, BELOW_ONE] = 0.1
    # Share of the steps, at the end, in which the ranks do not change.
    final_share: Annotated[float, BELOW_ONE] = 0.3
    # Steps between two allocations.
    interval: Annotated[int, SIZE] = 10
    # Decay of the EMA of a weight's sensitivity, |weight x gradient|.
    sensitivity_decay: Annotated[float, BELOW_ONE] = 0.85
    # Decay of the EMA of the distance between the sensitivity and its EMA.
    uncertainty_decay: Annotated[float, BELOW_ONE] = 0.85
    # Weight of the penalty that keeps A's columns, and B's rows, orthonormal.
    orthogonality: Annotated[float, Range("a number", "[0, 1000]")] = 0.5

    def steps(self, total: int) -> tuple[int, int]:
        """Returns the last step with all ranks and the step of the last allocation.

        Steps are counted from 1 to ``total``.
        """
        return int(self.warmup_share * total), total - int(self.final_share * total)

    def find_final_step(self, total: int) -> int:
        """Returns the first step with the final ranks; no earlier state is exported.

        Without AdaLoRA it is 0.
        """
        if not self.target_rank:
            return 0
        return self.steps(total)[1]


@dataclass(frozen=True)
class OptimizerConfig:
    """The inner optimizer and its schedule."""

    # "adamw", "adam", "sgd", "lion" or "adafactor".
    name: Literal["adamw", "adam", "sgd", "lion", "adafactor"] = "adamw"
    # Peak learning rate; 0, "auto" on the command line: 4e-3 on SmolLM2-135M; lower on wider
    # models, with an alpha above 16 and with non-zero initializations, higher with AdaLoRA.
    learning_rate: Annotated[float, Range("a number", "[0, 1000]"), ACCEPTS_AUTO] = 0.0
    # "cosine", "linear" or "constant", after a linear warm-up.
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    # Learning rate of some adapters relative to the others: (pattern, factor) pairs, the first
    # match wins, e.g. ffn/gate_proj 2. Patterns are searched in paths such as
    # "layers/ffn/gate_proj"; an unused pattern is an error.
    rates: tuple[tuple[str, float], ...] = ()
    # Share of the steps spent warming up.
    warmup_share: Annotated[float, SHARE_RANGE] = 0.05
    # Steps spent warming up, in place of the share; 0: the share decides.
    warmup_steps: Annotated[int, COUNT] = 0
    # Start the warm-up at a learning rate of 0, as transformers does; the first step then has no
    # effect.
    warmup_from_zero: bool = False
    # Learning rate at the end divided by its peak.
    final_ratio: Annotated[float, SHARE_RANGE] = 0.1
    # Decoupled weight decay.
    weight_decay: Annotated[float, Range("a number", "[0, 1000]")] = 0.0
    # Adam's b1, the decay of its EMA of gradients (lion's too).
    b1: Annotated[float, BELOW_ONE] = 0.9
    # Adam's b2, the decay of its EMA of squared gradients (lion's too).
    b2: Annotated[float, BELOW_ONE] = 0.999
    # Adam's eps, added to the root of the EMA of squares.
    eps: Annotated[float, Range("a number", "(0, 1]")] = 1e-8
    # Dtype of Adam's EMA of gradients; "bfloat16" halves its memory.
    first_moment: Literal["float32", "bfloat16"] = "float32"
    # Global-norm clip of the gradient; 0 turns it off.
    clip_norm: Annotated[float, Range("a number", "[0, 1e9]")] = 1.0


@dataclass(frozen=True)
class DataConfig:
    """The training and evaluation data, and the conversion of text to packed sequences."""

    # A task of this library ("socialiqa", ...), "tfds:<name>", "hf:<org>/<name>", the path or gs://
    # or s3:// URL of a file (JSONL, JSON, CSV, TSV, Parquet, Arrow, ArrayRecord) or folder; or
    # several: "a.jsonl*3,b.parquet".
    dataset: str = "socialiqa"
    # TFDS folder that contains (or receives) a "tfds:" data set; empty means TFDS's default.
    data_dir: str = ""
    # Split to train on, e.g. "train[:10%]" (a TFDS expression); a file has one split, "train".
    train_split: str = "train"
    # Split held out for evaluation, another file's path, or "auto": the split "validation" if
    # there is one, else 5% of the training records (at least 20, or a fifth of fewer than 100
    # records; at most 500), drawn once by a fixed seed.
    eval_split: str = "auto"
    # Held-out examples for the evaluation before and after training (0: all that are left), drawn
    # once by a fixed seed.
    eval_limit: Annotated[int, COUNT] = 400
    # Other held-out examples, evaluated during training, which select the checkpoint that is
    # exported.
    select_limit: Annotated[int, SIZE] = 200
    # Tokens per packed sequence; 0, "auto" on the command line: a multiple of 8 that fits 99% of
    # the examples without truncation, at least 128 with packing and up to four times as long where
    # shorter rows are less than 90% full, at most the model's context.
    max_length: Annotated[int, LENGTH, ACCEPTS_AUTO] = 0
    # Pack several examples into one sequence (they never attend to each other); off: one example
    # per sequence.
    pack: bool = True
    # Examples longer than max_length: "error", "drop", "truncate" (from the left of the prompt) or
    # "split" (into rows, each with positions from 0; every token stays a target once).
    too_long: Literal["error", "drop", "truncate", "split"] = "drop"
    # Loss tokens: the "answer" (completion or last assistant turn), every "assistant" turn, "all".
    loss_on: Literal["answer", "assistant", "all"] = "answer"
    # Only loss tokens among the last tokens of an example count: a number of tokens, or below 1 a
    # share of the example; 0: all. Of an example that was split, the last tokens of every row.
    loss_last: Annotated[float, Range("a number", "[0, 1e9]")] = 0.0
    # Wrap prompts in the model's chat template.
    chat: bool = False
    # Tokens to add to the tokenizer, each encoded as one id; needs --lora.modules-to-save
    # embed_tokens lm_head, or the ids in --lora.trainable-token-indices: new rows start as the
    # mean of the others and are trained.
    add_tokens: tuple[str, ...] = ()
    # The same for special tokens, such as the marks of a tool call: generated text is shown
    # without them.
    add_special_tokens: tuple[str, ...] = ()
    # Field of a record that holds the prompt.
    prompt_field: str = "prompt"
    # Field of a record that holds the completion.
    completion_field: str = "completion"
    # Field of a record that holds chat turns, in place of prompt and completion.
    messages_field: str = "messages"
    # Largest number of training examples (0: all): the first after the shuffle.
    train_limit: Annotated[int, COUNT] = 0
    # Threads that assemble batches ahead of the step; 0 assembles them in the step's thread.
    workers: Annotated[int, Range("a whole number", "[0, 1024]")] = 1


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh: 0 lets the library choose, -1 takes all others.

    Axes with 0 are chosen by a roofline model, together with ``compute.remat``: the fastest choice
    that fits in memory.
    """

    # Splits the batch; weights are replicated.
    data: Annotated[int, AXIS] = 0
    # Splits the batch and the weights (gathered layer by layer).
    fsdp: Annotated[int, AXIS] = 0
    # Splits heads and FFN channels.
    tensor: Annotated[int, AXIS] = 0
    # Splits the tokens of rows that are too long for one device, and the weights as fsdp does.
    context: Annotated[int, AXIS] = 0
    # Sweeps: groups of devices that train different runs; 0 lets the library choose.
    run: Annotated[int, COUNT] = 0
    # Sweeps: runs that share one group of devices and its copy of the base; 0: as many as fit.
    runs_per_device: Annotated[int, COUNT] = 0


@dataclass(frozen=True)
class TrainConfig:
    """Batch, intervals and checkpoints."""

    # Packed sequences (examples of image tasks) per optimizer step over all devices.
    batch_size: Annotated[int, ROW_COUNT] = 8
    # Micro-batches per step; batch_size is split into them and their gradients are accumulated.
    accumulate: Annotated[int, ROW_COUNT] = 1
    # Steps between log lines.
    log_every: Annotated[int, SIZE] = 10
    # Steps between evaluations; -1: 50, or half of a run below 100 steps; 0: none during training.
    eval_every: Annotated[int, INTERVAL] = -1
    # Steps between checkpoints; 0 turns checkpoints during training off.
    save_every: Annotated[int, COUNT] = 50
    # Checkpoints to keep in addition to the best one.
    keep: Annotated[int, COUNT] = 2
    # Patience: stop after this many evaluations without a better metric (0: never).
    patience: Annotated[int, COUNT] = 0


# Activations stored for the backward pass: `nalora_jax.models.remat.REMAT`, or "auto" for the
# best.
Remat = Literal[
    "auto", "none", "full", "attention", "dots_last", "dots",
    "full_offload", "attention_offload", "dots_offload",
]  # fmt: skip
ExpertDispatch = Literal["auto", "gather", "send"]


@dataclass(frozen=True)
class ComputeConfig:
    """Numerics and memory."""

    # Dtype of base weights and matmul operands; adapters, sums and norms stay float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # Store the adapted model's projections quantized (QLoRA): "int8", "nf4" (4 bits), "mxfp4" (4
    # bits, feed-forward projections only), or "none".
    quantize: Literal["none", "int8", "nf4", "mxfp4"] = "none"
    # Implementation of the operations: "auto" (the fastest on the platform), "xla" (plain JAX), or
    # an implementation by name, such as "cpu".
    implementation: str = "auto"
    # Rematerialization: "auto" (by platform, as measured), "none", "full", "dots" (store the
    # results of matmuls), "attention" (the same without results of width d_ff), or "dots_last"
    # ("dots" in the last layer of each period of different layers, "attention" in the others). With
    # _offload, they are stored in the host's memory (TPU, GPU).
    remat: Remat = "auto"
    # Experts that "fsdp" splits: "gather" them for each layer, "send" each token to its experts, or
    # "auto" (the faster by the estimates of --mesh auto; elsewhere the way that moves fewer bytes;
    # "gather" with offloaded activations).
    experts: ExpertDispatch = "auto"
    # Compute the channel statistics on one in n positions of each packed sequence (1: on all).
    stats_stride: Annotated[int, SIZE] = 4
    # Largest number of these positions per packed sequence: longer sequences get larger strides,
    # also for the probe; 0: no limit.
    stats_positions: Annotated[int, COUNT] = 256
    # Compute the misalignment probe on one in n positions.
    probe_stride: Annotated[int, SIZE] = 8
    # Hidden states (tokens) per chunk of the cross-entropy, on each device; 0 chooses by platform
    # and vocabulary.
    loss_chunk: Annotated[int, COUNT] = 0
    # Keep compiled programs in the cache folder, so that the next start skips compilation.
    compilation_cache: bool = True

    @property
    def itemsize(self) -> int:
        """Returns the bytes of a base weight that is not quantized."""
        return {"bfloat16": 2, "float32": 4}[self.dtype]

    @property
    def quantized(self) -> Literal["int8", "nf4", "mxfp4"] | None:
        """Returns the storage of the projections; None if they are not quantized."""
        if self.quantize == "none":
            return None
        return self.quantize


@dataclass(frozen=True)
class DebugConfig:
    """Expensive checks and measurements."""

    # Check the gates of the live model in every step, channel by channel (chexify): the
    # pre-activation, the gate-compensation identity, Activation.gate against rho and its
    # derivative, the input of the down projection, padding in the statistics, and the mask in the
    # gradient of A.
    check_gates: bool = False
    # Tolerance of that check, relative to |F| + |S|; bfloat16 rounding is allowed in addition.
    tolerance: Annotated[float, Range("a number", "(0, 1]")] = 1e-4
    # Write an xprof trace of STEPS steps starting at step START, as START:STEPS, to `profile` in
    # the output folder.
    profile: str = ""

    @property
    def profiled(self) -> range:
        """Returns the range of the steps that `profile` names, which must be well formed; empty
        without it."""
        first, _, count = (self.profile or "0:0").partition(":")
        return range(int(first), int(first) + int(count))


@dataclass(frozen=True)
class VisionConfig:
    """Dual encoders (CLIP, ...) and multimodal decoders (LLaVA, ...), on --data.dataset."""

    # "" (a language model), "classify" (images among class prompts), "contrast" (images and their
    # captions) or "chat" (conversations about images, with a multimodal decoder).
    task: Literal["", "classify", "contrast", "chat"] = ""
    # Training images per class, drawn by --seed; 0: all of them.
    shots: Annotated[int, COUNT] = 16
    # Prompts of a class, {} is replaced by its name; features of several prompts are averaged.
    templates: tuple[str, ...] = ("a photo of a {}.",)
    # Names of the classes in place of the data set's own, in the order of its labels.
    classes: tuple[str, ...] = ()
    # Field of a record that holds the image: its bytes, or a file's path.
    image_field: str = "image"
    # Field that holds the image's class: a number or a name.
    label_field: str = "label"
    # Field that holds the image's caption.
    caption_field: str = "caption"
    # chat: the prompt for captions, in records that have no messages and no prompt.
    prompt: str = "Describe the image."
    # Random changes of training images, by (seed, step): "none", "flip", or "crop" (a part of it,
    # and flips).
    augment: Literal["none", "flip", "crop"] = "crop"
    # Smallest share of an image's area that a crop keeps.
    crop_area: Annotated[float, POSITIVE_SHARE] = 0.5
    # Images that are broken, animated or too large: "skip" (named in the log) or "error".
    broken: Literal["skip", "error"] = "skip"
    # Largest number of pixels of an image. Larger images are rejected before they are decoded; of
    # models with images of any shape, they are resized to it if their processor's limit is higher.
    max_pixels: Annotated[int, SIZE] = 50_000_000
    # Models with images of any shape: smaller images are enlarged to this number of pixels; 0: the
    # processor's.
    min_pixels: Annotated[int, COUNT] = 0
    # classify, contrast: side in pixels of the squares that images are resized to, a multiple of
    # the patch size; positions are interpolated (smaller is faster); 0: the model's size.
    image_size: Annotated[int, Range("a whole number", "[0, 65536]")] = 0
    # Largest number of tokens of a caption; 0: the text encoder's limit.
    caption_length: Annotated[int, COUNT] = 0
    # Two separately trained towers "image+text": features of their new projections; 0: the
    # narrower tower's width.
    features: Annotated[int, Range("a whole number", "[0, 65536]")] = 0
    # Two separately trained towers: the training loss.
    loss: Literal["softmax", "sigmoid"] = "softmax"

    @property
    def trains_encoders(self) -> bool:
        """Returns True for the tasks of dual encoders."""
        return self.task in ("classify", "contrast")

    @property
    def reads_chats(self) -> bool:
        """Returns True for conversations about images."""
        return self.task == "chat"

    @property
    def kind(self) -> str:
        """Returns the kind of run that the task asks for; "" if it asks for none."""
        if self.trains_encoders:
            return "dual"
        return "images" if self.task else ""


@dataclass(frozen=True)
class PreferenceConfig:
    """Preference tuning on pairs of a chosen and a rejected response.

    The reference is the base without the adapter.
    """

    # "none" (train on the data set's responses), "dpo" (direct preference optimization, arXiv
    # 2305.18290), "robust" (DPO for pairs of which a known share is swapped, 2403.00409), "ipo"
    # (2310.12036), without a reference "simpo" (2405.14734) or "orpo" (2403.07691), or "kto"
    # (2402.01306), of records with one response and a label.
    loss: Literal["none", "dpo", "robust", "ipo", "simpo", "orpo", "kto"] = "none"
    # Beta: weight of the log-ratio to the reference; with small values the model may move further
    # from it. In "simpo" it is the weight of the log-probability per token (2 to 10), in "orpo"
    # that of the odds ratio.
    beta: Annotated[float, Range("a number", "(0, 1000]")] = 0.1
    # Assumed share of pairs with swapped labels: of "dpo" (conservative DPO), "robust" and "simpo".
    label_smoothing: Annotated[float, Range("a share", "[0, 0.5)")] = 0.0
    # Divide each log-ratio by the number of tokens of its response, so that long responses do not
    # count more; beta is then larger, 1 to 10 (TRL's "sigmoid_norm"). Of "dpo" and "robust".
    per_token: bool = False
    # Gamma: margin that "simpo" demands between the rewards of both responses.
    gamma: Annotated[float, Range("a number", "[0, 1000]")] = 0.5
    # Weight of the chosen response's negative log-likelihood per token, added to the loss; "orpo"
    # has it with weight 1.
    nll_weight: Annotated[float, Range("a number", "[0, 1000]")] = 0.0
    # Weight each pair by how likely the model is to write both responses itself (weighted
    # preference optimization, arXiv 2406.11827), for pairs that other models have written;
    # evaluations have no weights. Of "dpo", "robust" and "ipo".
    weighted: bool = False
    # Weight of desirable responses in "kto". With many more of one class, choose weights for which
    # weight times number of records is about equal.
    desirable_weight: Annotated[float, Range("a number", "[0, 1000]")] = 1.0
    # Weight of the other responses in "kto".
    undesirable_weight: Annotated[float, Range("a number", "[0, 1000]")] = 1.0
    # Field of a record of "kto" that is true (or 1) if its response is desirable, else false (0).
    label_field: str = "label"
    # Field of a record that holds the preferred response: a text, or chat messages.
    chosen_field: str = "chosen"
    # Field that holds the other response.
    rejected_field: str = "rejected"

    @property
    def kind(self) -> str:
        """Returns the kind of run that the loss asks for; "" if it asks for none."""
        return "" if self.loss == "none" else "preference"


@dataclass(frozen=True)
class DistillConfig:
    """Distillation: the model learns the next-token distributions of a teacher, on the completions
    of the data set or on its own samples."""

    # Teacher: the folder of a run or of an adapter in PEFT's format, on the run's base model; or
    # another model with the same vocabulary, as --model. Empty: the base itself, with
    # --distill.system.
    teacher: str = ""
    # System prompt that only the teacher reads, before the one of a chat that has one; the model
    # learns to answer as if it had read it.
    system: str = ""
    # Divergence: 0 forward KL, of the teacher from the model; 1 reverse KL, of the model from the
    # teacher; between them generalized Jensen-Shannon (arXiv 2306.13649, as TRL's GKDTrainer).
    beta: Annotated[float, SHARE_RANGE] = 0.5
    # Temperature by which the logits of both are divided.
    temperature: Annotated[float, Range("a number", "(0, 1000]")] = 1.0
    # Train on samples that the model draws before each step, in place of the data set's
    # completions: --rl.samples of each prompt, with --rl.max-new-tokens, --rl.temperature,
    # --rl.mask-cut, --rl.system-prompt and --rl.servers.
    on_policy: bool = False

    @property
    def kind(self) -> str:
        """Returns the kind of run that a teacher asks for; "" without one."""
        return "distill" if self.teacher or self.system else ""


@dataclass(frozen=True)
class RLConfig:
    """Reinforcement learning with verifiable rewards: the policy samples, rewards are computed, and
    it is updated.

    ``train.batch_size`` counts samples, and ``data.max_length`` is the limit of prompt plus sample.
    """

    # Rewards of a sample, NAME, NAME:setting=value,... or MODULE:FUNCTION; of "exact", "number",
    # "choice", "regex", "format", "length", "reasoning_gym" and those that --import files register;
    # none: training on the data set's responses.
    rewards: tuple[str, ...] = ()
    # Weight of each reward in the sum, the environment's first; 1 without.
    reward_weights: tuple[float, ...] = ()
    # The loss: "grpo" (arXiv 2402.03300), "dr_grpo" (2503.20783), "dapo" (2503.14476), "gspo"
    # (2507.18071) or "rloo" (2402.14740).
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo"] = "grpo"
    # Samples of a prompt; rewards of at least 2 are compared with each other.
    samples: Annotated[int, Range("a whole number", "[1, 4096]")] = 8
    # Largest number of tokens of a sample.
    max_new_tokens: Annotated[int, SIZE] = 256
    # Temperature of the samples.
    temperature: Annotated[float, Range("a number", "(0, 10]")] = 1.0
    # Weight of the divergence from the base (the adapter off).
    beta: Annotated[float, Range("a number", "[0, 1000]")] = 0.0
    # Distance below 1 at which a probability ratio is clipped; 0: the loss's own.
    clip_low: Annotated[float, BELOW_ONE] = 0.0
    # Distance above 1; 0: the loss's own.
    clip_high: Annotated[float, Range("a number", "[0, 1000]")] = 0.0
    # Optimizer steps on the samples of one rollout.
    updates: Annotated[int, Range("a whole number", "[1, 1024]")] = 1
    # Replace groups whose rewards are all equal by those of other prompts, up to so many times
    # (dynamic sampling of DAPO).
    resample: Annotated[int, Range("a whole number", "[0, 64]")] = 0
    # Leave samples that the limit of tokens cut out of the loss.
    mask_cut: bool = False
    # Take the experts that the generator chose in the update, too, so that the log-probabilities of
    # both differ by rounding only; of models with experts.
    replay_routing: bool = False
    # System prompt of chats that have none.
    system_prompt: str = ""
    # Environment of several turns, NAME, NAME:setting=value,... or MODULE:CLASS; its reward comes
    # before those of `rewards`. A sample then includes all turns and the environment's messages.
    environment: str = ""
    # Largest number of turns of the model in a sample, with an environment.
    max_turns: Annotated[int, SIZE] = 8
    # Largest number of tokens of a turn, with an environment; 0: the sample's limit.
    max_turn_tokens: Annotated[int, COUNT] = 0
    # Also evaluate pass@k: the probability that one of k samples of a held-out prompt passes.
    pass_at: tuple[int, ...] = ()
    # Weighted sum of rewards from which a sample passes.
    pass_reward: Annotated[float, Range("a number", "[-1000000, 1000000]")] = 1.0
    # Time limit of a reward, or of a step of an environment, in seconds; 0: none.
    reward_seconds: Annotated[float, Range("a number", "[0, 1e5]")] = 30.0
    # Train on without the reward of a sample for which it fails or takes too long.
    ignore_reward_errors: bool = False
    # Addresses of OpenAI-compatible servers (vLLM, SGLang) that draw the samples; none: the
    # generator of this library.
    servers: tuple[str, ...] = ()
    # Folder or bucket for the adapters that servers load; default: "served" in the output.
    server_adapters: str = ""
    # The same folder as servers see it, if its path differs there.
    server_path: str = ""
    # Rollouts that servers draw ahead of the update, with an earlier adapter; 0: none.
    staleness: Annotated[int, Range("a whole number", "[0, 64]")] = 0
    # Time limit of a request to a server in seconds.
    server_seconds: Annotated[float, Range("a number", "(0, 1e5]")] = 600.0
    # Seconds to wait for a server that cannot be reached, before it is dropped.
    server_wait: Annotated[float, Range("a number", "[0, 1e5]")] = 300.0
    # Largest importance weight of a token of a server's sample; 0: no weights.
    importance_clip: Annotated[float, Range("a number", "[0, 1e5]")] = 2.0
    # Range of importance weights, LOW HIGH, outside of which a token is left out of the loss.
    importance_tokens: tuple[float, ...] = ()
    # Range of the geometric mean of a sample's weights, LOW HIGH, outside of which it is left out.
    importance_samples: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        """Returns the kind of run that rewards or an environment ask for; "" without."""
        return "rl" if self.rewards or self.environment else ""

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Returns the environment, if there is one, and the rewards: the columns of a sample's
        rewards."""
        if self.environment:
            return (self.environment, *self.rewards)
        return self.rewards


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of sampling, as transformers defines them."""

    # Maximum number of generated tokens; fewer at the end of the context.
    max_new_tokens: Annotated[int, TOKEN_COUNT] = 128
    # Sampling temperature; 0 takes the likeliest token each time.
    temperature: Annotated[float, AMOUNT] = 0.0
    # Sample from the k likeliest tokens only (0: from all).
    top_k: Annotated[int, COUNT] = 0
    # Sample from the likeliest tokens that together have this probability.
    top_p: Annotated[float, POSITIVE_SHARE] = 1.0
    # Sample from tokens with at least this share of the highest probability (0: from all).
    min_p: Annotated[float, SHARE_RANGE] = 0.0
    # Penalty of tokens that occur in the prompt or the response, also at temperature 0; 1: none,
    # above 1 repeats less.
    repetition_penalty: Annotated[float, POSITIVE] = 1.0


@dataclass(frozen=True)
class RunConfig:
    """All settings of one fine-tuning run; the defaults are the main job of the README."""

    # An alias ("smollm2-135m-instruct"), a Hugging Face id, a folder with safetensors, or a .gguf
    # file; also their URL.
    model: str = "smollm2-135m-instruct"
    # RoPE scaling in place of the model's, for rows beyond its context, as TYPE:field=value,...
    # with the types and
    # fields of transformers: "yarn:factor=4", "linear:factor=2", "dynamic:factor=2",
    #   "llama3:factor=16".
    rope_scaling: Annotated[str, arg(name="model.rope-scaling")] = ""
    # Adapter to continue: the folder of a run, or of an adapter in PEFT's format. The run starts
    # from its values and has its base model, ranks, alphas, variant and trained tables.
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
    steps: Annotated[int, SIZE] = 100
    # Passes over the data, in place of steps; 0: `steps` decides.
    epochs: Annotated[float, AMOUNT] = 0.0
    # Seed of adapters, data order and dropout.
    seed: Annotated[int, SEED] = 0
    # Further outputs of the log: NAME or NAME:setting=value,... of tensorboard, wandb, mlflow
    # (docs/quick_start.md).
    callbacks: tuple[str, ...] = ()
    # Rules that weigh the gates' gradients and updates, in this order: NAME or
    # NAME:setting=value,... (docs/method.md lists them); "none" on the command line: plain LoRA.
    # "soft:power=2 homogeneity" are the mask and the step scale of the paper's abstract.
    mechanisms: tuple[str, ...] = ("curvature_cap",)
    # Kind of run in place of the one that the other settings ask for: a name that a file of
    # --import registers, as NAME or NAME:setting=value,...
    kind: str = ""
    # Python files that are executed first, to register your rules, activations, families or
    # sources; recorded with their digests. Use only files that you trust. On the command line
    # --import FILE ..., with any command.
    imports: tuple[str, ...] = ()

    # Weights of the model that are trained themselves: "full", all of them in place of adapters; or
    # patterns, besides the adapters, which are searched in paths such as
    # "layers/29/ffn/gate_proj/kernel": norm, bias, embed/embedding, layers/2[89]/.
    tune: tuple[str, ...] = ()

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
    rl: RLConfig = field(default_factory=RLConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    @property
    def has_adapters(self) -> bool:
        """Returns False if all weights are trained in place of adapters."""
        return self.tune != (FULL,)

    @property
    def kind_name(self) -> str:
        """Returns the name of the kind of run that the settings ask for."""
        named, _, _ = self.kind.partition(":")
        asked = (
            named,
            self.rl.kind,
            self.preference.kind,
            self.vision.kind,
            self.distill.kind,
        )
        return next(filter(None, asked), "text")

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain dicts, for JSON and the checkpoint's fingerprint."""
        return dataclasses.asdict(self)

    def without_mechanisms(self) -> RunConfig:
        """Returns the same run as plain LoRA."""
        return dataclasses.replace(self, mechanisms=())


def config_from_dict(values: Mapping[str, Any], where: str = "settings") -> RunConfig:
    """Returns the config whose `RunConfig.to_dict` is ``values``; lists become tuples.

    Unknown fields are ignored and missing fields have their defaults, so that logs of other
    versions can be read.

    Args:
      values: recorded settings, of any content.
      where: the file and its field, for messages.

    Raises:
      NaloraError: a setting has another type, for example because the file was edited.
    """
    try:
        return parse_dataclass(RunConfig, values, f"{where}: ", ignore_unknown=True)
    except NaloraError as error:
        remedy = "the file was edited or damaged: restore that line"
        raise NaloraError(
            error.where, expected=error.expected, found=error.found, remedy=remedy
        ) from None
