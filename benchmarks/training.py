"""One LoRA training process of this library, with the same work as peft_baseline.py.

    python benchmarks/training.py --dtype bfloat16 --batch 8 --seq 128 --steps 8
    python benchmarks/training.py --dtype bfloat16 --method nalora

Rank 8 on gate, up and down, AdamW, loss on all tokens, SmolLM2-135M with random weights (real ones
with --model). The last line printed is a JSON object: tokens per second of each step, losses, peak
memory, settings.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from common import (
    add_work,
    architecture,
    parser_of,
    peak_rss_mb,
    random_tokens,
    timed_steps,
)

# Plain LoRA, mask and step scale by homogeneity, the library's default; all weights without
# adapters.
METHODS = ("lora", "nalora", "default", "full")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_work(parser)
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument(
        "--remat", choices=("auto", "none", "full", "attention", "dots"), default="auto"
    )
    parser.add_argument(
        "--model", help="real weights by name; default: random ones of the same shape"
    )
    parser.add_argument(
        "--compilation-cache",
        action="store_true",
        help="keep compiled programs, as a run does",
    )
    return parser.parse_args(arguments)


def run_config(
    options: argparse.Namespace,
    *,
    method: str | None = None,
    warmup: int | None = 0,
    **parts: Any,
) -> Any:
    """Returns the settings of this work.

    Args:
      options: of `parse`.
      method: one of `METHODS`; by default the method of the options.
      warmup: steps before the mechanisms act: 0 for timed steps, which are few; None for the
        default.
      parts: other parts of the configuration.
    """
    from nalora_jax import config as c

    rules = {
        "lora": (),
        "nalora": ("soft:power=2", "homogeneity"),
        "default": c.RunConfig.mechanisms,
        "full": (),
    }
    method = method or options.method
    chosen = rules[method]
    if method == "full":
        parts["tune"] = ("full",)
    if warmup is not None:
        chosen = tuple(
            f"{rule}{',' if ':' in rule else ':'}warmup={warmup}" for rule in chosen
        )
    return c.RunConfig(
        steps=10_000,
        seed=options.seed,
        mechanisms=chosen,
        lora=c.LoRAConfig(rules=(c.LoRARule("ffn/(gate|up|down)_proj", options.rank),)),
        optimizer=c.OptimizerConfig(
            learning_rate=options.learning_rate,
            schedule="constant",
            warmup_share=0.0,
            clip_norm=0.0,
        ),
        compute=c.ComputeConfig(dtype=options.dtype, remat=options.remat),
        **parts,
    )


def without_statistics(step: Any) -> Any:
    """Returns a plain LoRA step without gate statistics.

    Outputs that depend on the statistics are removed, so that the compiler drops their computation.
    """
    import jax

    from nalora_jax.method.transform import replace_gate_state

    def plain(params: Any, state: Any, batch: Any) -> Any:
        new, metrics = step(params, state, batch)
        opt_state = replace_gate_state(new.opt_state, state.gate)
        return new._replace(opt_state=opt_state), {"loss": metrics["loss"]}

    return jax.jit(plain, donate_argnums=1)


def base_model(options: argparse.Namespace, mesh: Any) -> tuple[Any, Any]:
    """Returns architecture and weights."""
    import jax

    from nalora_jax.models.config import ModelConfig
    from nalora_jax.weights.base import load_model

    if options.model:
        loaded = load_model(options.model, dtype=options.dtype, mesh=mesh)
        return loaded.config, loaded.params
    base = ModelConfig.from_hf(architecture(options))
    make = jax.jit(random_params, static_argnums=(0, 2))
    return base, make(base, jax.random.key(options.seed), options.dtype)


def random_params(base: Any, key: Any, dtype: Any) -> Any:
    """Returns random base weights, each from a draw of its own: one of all would be the peak of the
    memory."""
    import jax

    from nalora_jax.common.trees import unflatten
    from nalora_jax.models.stacks import param_shapes
    from nalora_jax.models.targets import leaf_dtype

    # Threefry takes seconds to compile.
    key = jax.random.wrap_key_data(
        jax.numpy.resize(jax.random.key_data(key), (4,)), impl="rbg"
    )
    leaves = {}
    for i, (path, shape) in enumerate(param_shapes(base).items()):
        noise = jax.random.normal(jax.random.fold_in(key, i), shape, "float32")
        centre = 1.0 - base.norm_offset if path.endswith("/scale") else 0.0
        leaves[path] = (centre + noise / shape[max(len(shape) - 2, 0)] ** 0.5).astype(
            leaf_dtype(path, dtype)
        )
    return unflatten(leaves)


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
        "positions": np.broadcast_to(
            np.arange(seq, dtype=np.int32), (rows, seq)
        ).copy(),
    }
    from nalora_jax.mesh import distributed

    # [micro-batches, rows, seq]
    batch = {name: value[None] for name, value in flat.items()}
    return distributed.make_global_batch(batch, mesh, rows_axis=1)


def batches_of(options: argparse.Namespace, vocab: int, mesh: Any) -> list[Any]:
    """Returns the batches of all steps, the warm-up's first."""
    steps = options.warmup + options.steps
    return [
        batch_of(rows, mesh)
        for rows in random_tokens(
            steps, options.batch, options.seq, vocab, options.seed
        )
    ]


def main() -> None:
    options = parse()
    from nalora_jax.assembly.compilation import compile_ahead
    from nalora_jax.assembly.program import assemble
    from nalora_jax.config import MeshConfig
    from nalora_jax.mesh import distributed

    if options.compilation_cache:
        from nalora_jax.assembly.compilation import use_compilation_cache

        use_compilation_cache()
    mesh = distributed.make_mesh(MeshConfig())
    base, params = base_model(options, mesh)
    assembly = assemble(run_config(options), base, params, mesh)
    del params  # of which full tuning keeps none
    state, step = assembly.state, assembly.step
    params = assembly.view(assembly.params)
    batches = batches_of(options, base.vocab_size, mesh)
    compile_ahead(step, params, state, batches[0])
    held = [state]

    def train(batch: Any) -> float:
        held[0], metrics = step(params, held[0], batch)
        return float(metrics["loss"])

    record = timed_steps(
        train, batches, warmup=options.warmup, tokens=options.batch * options.seq
    )
    print(
        json.dumps(record | {"peak_rss_mb": peak_rss_mb(), "settings": vars(options)})
    )


if __name__ == "__main__":
    main()
