"""Training speed against the LoRA of other JAX libraries, Tunix and EasyDeL, at equal shapes.

    python -m venv tunix && tunix/bin/pip install google-tunix qwix
    python benchmarks/peers.py --peer Tunix --dtype float32 --peer-python tunix/bin/python
    python -m venv easydel && easydel/bin/pip install easydel
    python benchmarks/peers.py --peer EasyDeL --dtype float32 --peer-python easydel/bin/python

Each peer trains its Llama model with SmolLM2-135M's shapes and random weights, its adapters of rank
8 on gate, up and down, and the step that its trainer compiles, with AdamW and the loss on all
tokens: Tunix with Qwix's `LoraProvider` and the step of `PeftTrainer`, EasyDeL with
`apply_lora_to_layers` and the `training_step` of `Trainer`. Both run with and without
rematerialization of decoder layers, EasyDeL also with saved matmul results; the fastest setting
counts. --peer-python names a Python that has the peer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from common import SMOLLM2, add_rounds, compare, peak_rss_mb, random_tokens, script, values
from machines import versions
from tables import Row, at_least, compared_runs, requirements

TITLE = "Training against other JAX libraries: Tunix with Qwix LoRA, EasyDeL"
SHORT = "Training, Tunix"
# A peer's names of the rematerialization policies.
REMAT = {
    "Tunix": {"none": "NONE", "layers": "DECODER"},
    "EasyDeL": {"none": "", "layers": "nothing_saveable", "products kept": "checkpoint_dots"},
}


def tunix_model(dtype: str, remat: str, shape: Mapping[str, Any] = SMOLLM2) -> Any:
    """Returns Tunix's decoder with Qwix's adapters; ``shape`` has transformers' names."""
    import jax
    import qwix
    from flax import nnx
    from tunix.models.llama3 import model as llama

    config = llama.ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_attention_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=int(shape["rope_theta"]),
        norm_eps=shape["rms_norm_eps"],
        weight_tying=shape["tie_word_embeddings"],
        remat_config=llama.RematConfig[remat],
    )
    base = llama.Llama3(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(base)
    noise = np.random.default_rng(0)
    # Tunix initializes the feed-forward kernels to zero, so no gradient would flow.
    state = jax.tree.map(
        lambda x: np.asarray(noise.normal(0, 0.02, x.shape), dtype) if x.ndim > 1 else x.astype(dtype),
        state,
    )
    base = nnx.merge(graph, jax.tree.map(jax.numpy.asarray, state))
    provider = qwix.LoraProvider(module_path=".*(gate_proj|up_proj|down_proj)", rank=8, alpha=16.0)
    return qwix.apply_lora_to_model(base, provider, **base.get_model_input())


def tunix_step(dtype: str, remat: str, shape: Mapping[str, Any] = SMOLLM2) -> Any:
    """Returns Tunix's compiled step, from tokens ``[batch, seq]`` to the loss."""
    import jax.numpy as jnp
    import optax
    from tunix.sft import peft_trainer

    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=10**9, max_steps=100, checkpoint_root_directory=None
    )
    trainer = peft_trainer.PeftTrainer(
        tunix_model(dtype, remat, shape), optax.adamw(1e-3, weight_decay=0.0), config
    )
    trainer = trainer.with_gen_model_input_fn(lambda inputs: inputs)
    compiled, _ = trainer.jit_train_and_eval_step()

    def step(tokens: np.ndarray) -> float:
        rows, seq = tokens.shape
        positions = np.broadcast_to(np.arange(seq), (rows, seq))
        mask = np.broadcast_to(np.tril(np.ones((seq, seq), bool)), (rows, seq, seq))
        inputs = {"input_tokens": tokens, "input_mask": np.ones_like(tokens), "positions": positions}
        loss, *_ = compiled(
            {name: jnp.asarray(x) for name, x in (inputs | {"attention_mask": mask}).items()}
        )
        return float(loss)

    return step


def easydel_state(dtype: str, remat: str) -> Any:
    """Returns EasyDeL's decoder with its adapters, and optimizer state without base weights."""
    import easydel
    import optax
    from flax import nnx

    config = easydel.LlamaConfig(
        **SMOLLM2, gradient_checkpointing=remat, use_cache=False, sharding_axis_dims=(1, 1, 1, 1, 1)
    )
    with config.mesh:
        model = easydel.LlamaForCausalLM(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        model = model.apply_lora_to_layers(8, ".*(gate_proj|up_proj|down_proj).*", rngs=nnx.Rngs(1))
        optimizer = optax.adamw(1e-3, weight_decay=0.0)
        return easydel.EasyDeLState.create(model=model, tx=optimizer, init_opt_state=True)


def easydel_step(dtype: str, remat: str) -> Any:
    """Returns EasyDeL's compiled step, from tokens ``[batch, seq]`` to the loss."""
    import jax
    from easydel.trainers.trainer._fn import training_step

    held = [easydel_state(dtype, remat)]
    mesh = held[0].model.mesh
    compiled = jax.jit(training_step, donate_argnums=0)

    def step(tokens: np.ndarray) -> float:
        batch = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": tokens}
        with mesh:
            held[0], metrics = compiled(held[0], batch)
        return float(metrics.loss)

    return step


def one(options: argparse.Namespace) -> None:
    """Runs the measured process of a peer."""
    batch, seq = map(int, options.shape.split("x"))
    build = {"Tunix": tunix_step, "EasyDeL": easydel_step}[options.peer]
    step = build(options.dtype, REMAT[options.peer][options.one])
    seconds, losses = [], []
    for tokens in random_tokens(options.steps + 2, batch, seq, SMOLLM2["vocab_size"]):
        start = time.perf_counter()
        losses.append(step(tokens.astype(np.int32)))
        seconds.append(time.perf_counter() - start)
    speeds = [batch * seq / s for s in seconds[2:]]
    record = {
        "tokens_per_second": speeds,
        "losses": losses,
        "peak_rss_mb": peak_rss_mb(),
        "versions": versions(),
    }
    print(json.dumps(record))


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns speed, which has a requirement, and memory, against the peer's fastest setting."""
    found_rows = []
    for result in record["cases"].values():
        runs = result["runs"]
        best = max(
            set(runs) - {"nalora_jax"},
            key=lambda name: statistics.median(values(runs[name], "tokens_per_second")),
        )
        what = f"{result['settings']['dtype']} {result['settings']['shape']}, {best}"
        found_rows.append(
            compared_runs(f"tokens/s, {what}", runs, best, "tokens_per_second", at_least(1.6))
        )
        found_rows.append(compared_runs(f"peak memory, {what}", runs, best, "peak_rss_mb", None, unit="MB"))
    return found_rows


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=tuple(REMAT), default="Tunix")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shape", default="8x128", help="batch x sequence")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--remat", nargs="*", help="of the peer's ways (with --add): none, layers, products kept"
    )
    parser.add_argument("--no-ours", action="store_true", help="leave this library out (with --add)")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    add_rounds(parser, 1)
    options = parser.parse_args()
    if options.one:
        one(options)
        return
    batch, seq = options.shape.split("x")
    shared = ["--dtype", options.dtype, "--steps", options.steps]
    commands = {}
    if not options.no_ours:
        commands["nalora_jax"] = script(
            "training.py", *shared, "--batch", batch, "--seq", seq, "--method", "nalora"
        )
    for remat in REMAT[options.peer] if options.remat is None else options.remat:
        arguments = ["--one", remat, "--peer", options.peer, *shared, "--shape", options.shape]
        name = options.peer if remat == "none" else f"{options.peer}, remat {remat}"
        commands[name] = script("peers.py", *arguments, python=options.peer_python)
    record = compare("peers", f"{options.dtype} {options.shape}, {options.peer}", commands, options)
    runs = next(iter(record["cases"].values()))["runs"]
    if "nalora_jax" in runs and len(runs) > 1:
        print(table(record))


if __name__ == "__main__":
    main()
