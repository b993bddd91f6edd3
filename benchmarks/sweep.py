"""Runs of a sweep in one program against the same runs one after the other, in one process.

    python benchmarks/sweep.py --runs 8 --batch 1 --seq 64
    python benchmarks/sweep.py --runs 8 --batch 4 --seq 128

Rank 8 on gate, up and down, AdamW, SmolLM2-135M with random weights; the runs differ in their
learning rates and seeds. A solo run is compiled once and takes the platform's fastest
implementation. The last line
printed is a JSON object: the ratio of both times for one step of every run, tokens per second, and
the compiler's bytes of both programs.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from typing import Any

from common import (
    add_work,
    alternate,
    parser_of,
    peak_rss_mb,
    random_tokens,
    ratio,
    save,
)
from training import base_model, batch_of, run_config


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_work(parser)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument(
        "--model", help="real weights by name; default: random ones of the same shape"
    )
    parser.add_argument(
        "--save",
        action="store_true",
        help="write the figures to benchmarks/results/own",
    )
    parser.set_defaults(batch=1, seq=64, dtype="bfloat16", method="lora", remat="auto")
    return parser.parse_args()


def main() -> None:
    options = parse()
    import jax
    import numpy as np

    from nalora_jax.assembly.program import assemble
    from nalora_jax.config import MeshConfig
    from nalora_jax.mesh import distributed
    from nalora_jax.study.sweeps.stacked_program import SweepProgram

    mesh = distributed.make_mesh(MeshConfig(), jax.devices()[:1])
    base, params = base_model(options, mesh)
    tokens = random_tokens(options.runs, options.batch, options.seq, base.vocab_size)
    config = run_config(options)
    configs = [
        replace(
            config,
            seed=seed,
            optimizer=replace(config.optimizer, learning_rate=1e-3 * (1 + seed / 10)),
        )
        for seed in range(options.runs)
    ]

    first = assemble(configs[0], base, params, mesh)
    solo = [first, *[assemble(c, base, params, mesh, like=first) for c in configs[1:]]]
    step, view = solo[0].step, solo[0].view(params)
    states, batches = (
        [run.state for run in solo],
        [batch_of(rows, mesh) for rows in tokens],
    )
    alone = step.lower(view, states[0], batches[0]).compile().memory_analysis()

    def one_by_one() -> Any:
        for index, batch in enumerate(batches):
            states[index], metrics = step(view, states[index], batch)
        return metrics["loss"]

    program = SweepProgram(solo, base.d_model)
    joined = program.begin(states)
    stacked = {
        name: np.stack([np.asarray(batch[name]) for batch in batches])
        for name in batches[0]
    }
    batch = distributed.make_global_batch(stacked, mesh, rows_axis=2)
    together_bytes = program.lower(joined, batch).compile().memory_analysis()

    def together() -> Any:
        nonlocal joined
        joined, metrics = program.step(joined, batch, [True] * options.runs)
        return metrics["loss"]

    load = os.getloadavg()[0]
    pairs = alternate(one_by_one, together, pairs=options.pairs)
    count = options.runs * options.batch * options.seq
    medians = [float(np.median(seconds)) for seconds in pairs]
    record = {
        "ratio": ratio(*pairs),
        "tokens_per_second": {
            name: count / s for name, s in zip(("solo", "sweep"), medians, strict=True)
        },
        "bytes": {
            "solo_temporary": alone.temp_size_in_bytes,
            "sweep_temporary": together_bytes.temp_size_in_bytes,
            "sweep_arguments": together_bytes.argument_size_in_bytes,
        },
        "load_before": load,
        "peak_rss_mb": peak_rss_mb(),
        "settings": vars(options),
    }
    if options.save:
        save("sweep", f"{options.runs}x{options.batch}x{options.seq}", record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
