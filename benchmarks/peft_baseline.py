"""One LoRA training process of transformers + PEFT on torch, the baseline of this library.

    python benchmarks/peft_baseline.py --dtype bfloat16 --batch 8 --seq 128 --steps 8

Rank 8 on gate, up and down, AdamW, loss on all tokens, SmolLM2-135M (random weights, or real ones
with --model). The last line printed is a JSON object: tokens per second of each step, losses, peak
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
import time
from pathlib import Path
from typing import Any

from common import add_architecture, architecture, peak_rss_mb, random_tokens

# Modes of bfloat16: "pure" stores base and adapters in bfloat16; "mixed" is PEFT's default for a
# bfloat16 base (float32 adapters, casts around them); "autocast" adds torch.autocast to it;
# "autocast32" is autocast over a float32 base.
BF16_MODES = ("pure", "mixed", "autocast", "autocast32")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--bf16-mode", choices=BF16_MODES, default="pure")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after --warmup")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    add_architecture(parser)
    parser.add_argument(
        "--attention", choices=("sdpa", "eager"), help="default: sdpa for float32, eager for bfloat16"
    )
    parser.add_argument("--optimizer", choices=("fused", "foreach", "plain"), default="fused")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the model; default: for bfloat16",
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--model", type=Path, help="folder of real weights; default: random ones of the same shape"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    half = options.dtype == "bfloat16"
    options.attention = options.attention or ("eager" if half else "sdpa")
    # Checkpointed layers are recomputed outside the compiled graph: no default for the combination.
    options.compile = (half and not options.checkpointing) if options.compile is None else options.compile
    return options


def load_base(options: argparse.Namespace) -> Any:
    """Returns the frozen causal language model, in its training mode's dtype."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    full = options.dtype == "float32" or options.bf16_mode == "autocast32"
    choices = {"dtype": torch.float32 if full else torch.bfloat16, "attn_implementation": options.attention}
    if options.model:
        return AutoModelForCausalLM.from_pretrained(options.model, **choices)
    torch.manual_seed(options.seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture(options)), **choices)


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
    random = torch.from_numpy(random_tokens(*shape, architecture(options)["vocab_size"], options.seed))
    return [{"input_ids": tokens, "labels": tokens} for tokens in random]


def train(model: Any, options: argparse.Namespace) -> tuple[list[float], list[float], list[float], float]:
    """Returns wall and CPU seconds of the timed steps, all losses, and the end of the first step.

    The first loss is the warm-up's.
    """
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = {} if options.optimizer == "plain" else {options.optimizer: True}
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0, **kind)
    mixed = options.dtype == "bfloat16" and options.bf16_mode.startswith("autocast")
    seconds, busy, losses, done_at = [], [], [], 0.0
    for batch in inputs_of(options):
        start, start_busy = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        done_at = done_at or time.time()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - start_busy)
    return seconds[options.warmup :], busy[options.warmup :], losses, done_at


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Returns one training process's figures."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    model = adapt(load_base(options), options)
    loaded = time.perf_counter() - begun
    seconds, busy, losses, done_at = train(model, options)
    rates = [options.batch * options.seq / second for second in seconds]
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
    }
    return {
        "library": "peft",
        "settings": settings,
        "load_seconds": loaded,
        "seconds": seconds,
        "tokens_per_second": rates,
        "done_at": done_at,
        # Well below the number of threads: another program used the processor, and the rates above
        # are not reliable.
        "cores_busy": sum(busy) / sum(seconds) if seconds else None,
        "cpu_seconds_per_step": busy,
        "loss": losses,
        "peak_rss_mb": peak_rss_mb(),
    }


if __name__ == "__main__":
    print(json.dumps(run(parse())))
