"""One LoRA training process of this library, with the same work as peft_baseline.py.

    python benchmarks/training.py --dtype bfloat16 --batch 8 --seq 128 --steps 8
    python benchmarks/training.py --dtype bfloat16 --method nalora

Rank 8 on gate, up and down, AdamW, loss on all tokens, SmolLM2-135M with random weights (real ones
with --model). The last line printed is a JSON object: tokens per second of each step, losses, peak
memory, settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import numpy as np
from common import add_architecture, architecture, peak_rss_mb, random_tokens, summary

# Plain LoRA, mask and step scale by homogeneity, the library's default.
METHODS = ("lora", "nalora", "default")


def with_method(config: Any, method: str, *, warmup: int | None = 0) -> Any:
    """Returns a `RunConfig` with one of `METHODS`.

    ``warmup`` is the number of steps before the mechanisms act: 0 for timed steps, which are few;
    None for the library's default.
    """
    rules = {"lora": (), "nalora": ("soft:power=2", "homogeneity"), "default": type(config).mechanisms}[
        method
    ]
    if warmup is not None:
        rules = tuple(f"{rule}{',' if ':' in rule else ':'}warmup={warmup}" for rule in rules)
    return dataclasses.replace(config, mechanisms=rules)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after --warmup")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    add_architecture(parser)
    parser.add_argument("--remat", choices=("auto", "none", "full", "attention", "dots"), default="auto")
    parser.add_argument("--model", help="real weights by name; default: random ones of the same shape")
    parser.add_argument(
        "--compilation-cache", action="store_true", help="keep compiled programs, as a run does"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def run_config(options: argparse.Namespace, *, method: str | None = None) -> Any:
    """Returns the settings of this work, with one of `METHODS`."""
    from nalora_jax import config as c

    config = c.RunConfig(
        steps=10_000,
        seed=options.seed,
        lora=c.LoRAConfig(rules=(c.LoRARule("ffn/(gate|up|down)_proj", options.rank),)),
        optimizer=c.OptimizerConfig(
            learning_rate=options.learning_rate, schedule="constant", warmup_share=0.0, clip_norm=0.0
        ),
        compute=c.ComputeConfig(dtype=options.dtype, remat=options.remat),
    )
    return with_method(config, method or options.method)


def without_statistics(step: Any) -> Any:
    """Returns a plain LoRA step without gate statistics.

    Outputs that depend on the statistics are removed, so that the compiler drops their computation.
    """
    import jax

    from nalora_jax.method.transform import with_gate_state

    def plain(params: Any, state: Any, batch: Any) -> Any:
        new, metrics = step(params, state, batch)
        opt_state = with_gate_state(new.opt_state, state.gate)
        return new._replace(opt_state=opt_state), {"loss": metrics["loss"]}

    return jax.jit(plain, donate_argnums=1)


def base_model(options: argparse.Namespace, mesh: Any) -> tuple[Any, Any]:
    """Returns architecture and weights."""
    import jax

    from nalora_jax.models.config import ModelConfig
    from nalora_jax.models.decoder import init_params
    from nalora_jax.weights.base import load_model

    if options.model:
        loaded = load_model(options.model, dtype=options.dtype, mesh=mesh)
        return loaded.config, loaded.params
    base = ModelConfig.from_hf(architecture(options))
    return base, jax.jit(init_params, static_argnums=(0, 2))(
        base, jax.random.key(options.seed), options.dtype
    )


def batch_of(tokens: np.ndarray, mesh: Any) -> Any:
    """Returns rows of random tokens with a target at every position but the last."""
    rows, seq = tokens.shape
    weights = np.ones((rows, seq), np.float32)
    weights[:, -1] = 0
    flat = {
        "tokens": tokens.astype(np.int32),
        "targets": np.roll(tokens, -1, axis=1).astype(np.int32),
        "loss_weights": weights,
        "segment_ids": np.ones((rows, seq), np.int32),
        "positions": np.broadcast_to(np.arange(seq, dtype=np.int32), (rows, seq)).copy(),
    }
    from nalora_jax.layout import distributed

    batch = {name: value[None] for name, value in flat.items()}  # [micro-batches, rows, seq]
    return distributed.make_global_batch(batch, mesh, rows_axis=1)


def batches_of(options: argparse.Namespace, vocab: int, mesh: Any) -> list[Any]:
    """Returns the batches of all steps, the warm-up's first."""
    steps = options.warmup + options.steps
    return [
        batch_of(rows, mesh)
        for rows in random_tokens(steps, options.batch, options.seq, vocab, options.seed)
    ]


def main() -> None:
    options = parse()
    from nalora_jax.config import MeshConfig
    from nalora_jax.layout import distributed
    from nalora_jax.train.compilation import compile_ahead
    from nalora_jax.train.program import assemble

    if options.compilation_cache:
        from nalora_jax.train.compilation import use_compilation_cache

        use_compilation_cache()
    mesh = distributed.make_mesh(MeshConfig())
    base, params = base_model(options, mesh)
    assembly = assemble(run_config(options), base, params, mesh)
    state, step, params = assembly.state, assembly.step, assembly.view(params)
    batches = batches_of(options, base.vocab_size, mesh)
    losses, seconds, busy = [], [], []
    compile_ahead(step, params, state, batches[0])
    for i, batch in enumerate(batches):
        began, began_busy = time.perf_counter(), time.process_time()
        state, metrics = step(params, state, batch)
        losses.append(float(metrics["loss"]))
        if i == 0:
            done_at = time.time()
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - began_busy)
    speeds = [options.batch * options.seq / s for s in seconds[options.warmup :]]
    record = {
        "seconds": seconds[options.warmup :],
        "cpu_seconds_per_step": busy[options.warmup :],
        "tokens_per_second": speeds,
        "summary": summary(speeds) if speeds else None,
        "losses": losses,
        "done_at": done_at,
        "peak_rss_mb": peak_rss_mb(),
        "settings": vars(options),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
