"""One LoRA training process of transformers + PEFT on torch, the baseline of this library.

    python benchmarks/peft_baseline.py --dtype bfloat16 --batch 8 --seq 128 --steps 8

Rank 8 on gate, up and down, AdamW, loss on all tokens, SmolLM2-135M with random weights. The last
line printed is a JSON object: tokens per second of each step, losses, peak
memory, settings.

The defaults are the fastest settings found at 8 x 128 on a CPU with AVX512-BF16: scaled-dot-product
attention for float32, which compilation does not make faster; all-bfloat16, eager attention and
torch.compile for bfloat16. Other
machines and shapes may differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

from common import (
    add_work,
    architecture,
    parser_of,
    peak_rss_mb,
    random_tokens,
    timed_steps,
)

# Modes of bfloat16: "pure" stores base and adapters in bfloat16; "mixed" is PEFT's default for a
# bfloat16 base (float32 adapters, casts around them); "autocast" adds torch.autocast to it;
# "autocast32" is autocast over a float32 base.
BF16_MODES = ("pure", "mixed", "autocast", "autocast32")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_work(parser)
    parser.add_argument("--bf16-mode", choices=BF16_MODES, default="pure")
    parser.add_argument(
        "--checkpointing", action="store_true", help="gradient checkpointing"
    )
    parser.add_argument(
        "--full", action="store_true", help="train all weights, without PEFT"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the model; default: for bfloat16",
    )
    options = parser.parse_args(arguments)
    half = options.dtype == "bfloat16"
    # Checkpointed layers are recomputed outside the compiled graph: no default for the combination.
    options.compile = (
        (half and not options.checkpointing)
        if options.compile is None
        else options.compile
    )
    return options


def load_base(options: argparse.Namespace) -> Any:
    """Returns the frozen causal language model, in its training mode's dtype."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    full = options.dtype == "float32" or options.bf16_mode == "autocast32"
    attention = "eager" if options.dtype == "bfloat16" else "sdpa"
    choices = {
        "dtype": torch.float32 if full else torch.bfloat16,
        "attn_implementation": attention,
    }
    torch.manual_seed(options.seed)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**architecture(options)), **choices
    )


def adapt(base: Any, options: argparse.Namespace) -> Any:
    """Returns the PEFT model in training mode."""
    import torch
    from peft import LoraConfig, get_peft_model

    base.config.use_cache = False
    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=["gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    pure = options.dtype == "bfloat16" and options.bf16_mode == "pure"
    model = base
    if not options.full:
        model = get_peft_model(base, config, autocast_adapter_dtype=not pure)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    return torch.compile(model) if options.compile else model


def inputs_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the model's arguments of each step, the warm-up's first."""
    import torch

    shape = (options.warmup + options.steps, options.batch, options.seq)
    random = torch.from_numpy(
        random_tokens(*shape, architecture(options)["vocab_size"], options.seed)
    )
    return [{"input_ids": tokens, "labels": tokens} for tokens in random]


def stepper(
    model: Any, options: argparse.Namespace
) -> Callable[[dict[str, Any]], float]:
    """Returns the function that trains on a batch and returns the loss."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=options.learning_rate, weight_decay=0.0, fused=True
    )
    mixed = options.dtype == "bfloat16" and options.bf16_mode.startswith("autocast")

    def step(batch: dict[str, Any]) -> float:
        with (
            torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext()
        ):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Returns one training process's figures."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    step = stepper(adapt(load_base(options), options), options)
    tokens = options.batch * options.seq
    record = timed_steps(step, inputs_of(options), warmup=options.warmup, tokens=tokens)
    return record | {"peak_rss_mb": peak_rss_mb(), "settings": vars(options)}


if __name__ == "__main__":
    print(json.dumps(run(parse())))
