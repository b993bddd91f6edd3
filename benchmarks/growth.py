"""Growth of step time and memory with every size, against the expected order.

    python benchmarks/growth.py                       # all sizes, and the plot notes/growth.svg
    python benchmarks/growth.py --axis seq depth

A small model (4 layers, width 256, feed-forward 1024, 4 heads, vocabulary 8,192, rank 8 on gate, up
and down, 4 rows of 256 tokens, float32) trains NA-LoRA steps while one size at a time doubles. Time is
the fastest of several steps, memory the compiled program's arguments and temporaries. The growth is
the exponent between the last two sizes: 1 doubles with the size, 0 is constant. The expected
exponent follows from the number of operations once that size dominates; smaller is better. In the
plot the dashed line has the expected order and ends at the largest size; values above it at small
sizes are cost that does not grow.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import save
from tables import Row, at_most, growth_exponent, markdown

TITLE = "Growth"
SHORT = "Growth"
PLOT = Path(__file__).parent / "notes" / "growth.svg"
BASE = {"depth": 4, "width": 256, "seq": 256, "batch": 4, "rank": 8, "vocabulary": 8192}
NOISE = 0.15  # allowed on top of an expected exponent
# Sizes of each axis, and the expected exponents of time and of memory.
AXES = {
    "depth": ((2, 4, 8, 16), 1, 1),
    "width": ((128, 256, 512, 1024), 2, 2),
    "seq": ((512, 1024, 2048, 4096, 8192), 2, 1),
    "batch": ((2, 4, 8, 16), 1, 1),
    "rank": ((4, 8, 16, 32, 64), 1, 1),
    "vocabulary": ((8192, 16384, 32768, 65536, 131072), 1, 1),
}


def base_config(sizes: dict[str, int]) -> Any:
    """Returns the model of the given sizes; heads are 64 wide."""
    from nalora_jax.models.config import ModelConfig

    width = sizes["width"]
    return ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": sizes["vocabulary"],
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": sizes["depth"],
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 64,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
        }
    )


def training_step(sizes: dict[str, int]) -> tuple[Any, int]:
    """Returns a function that trains one step and waits for it, and the program's memory."""
    import jax
    from training import batch_of, parse, run_config

    from nalora_jax import distributed
    from nalora_jax.config import MeshConfig
    from nalora_jax.models.decoder import init_params
    from nalora_jax.train.assembly import assemble

    base = base_config(sizes)
    mesh = distributed.make_mesh(MeshConfig())
    options = parse(["--method", "nalora", "--rank", str(sizes["rank"])])
    assembly = assemble(run_config(options), base, init_params(base, jax.random.key(0)), mesh)
    tokens = np.random.default_rng(0).integers(0, base.vocab_size, (sizes["batch"], sizes["seq"]))
    batch = batch_of(tokens, mesh)
    params = assembly.view(assembly.params)
    program = assembly.step.lower(params, assembly.state, batch).compile()
    held = [assembly.state]

    def step() -> None:
        held[0], metrics = program(params, held[0], batch)
        float(metrics["loss"])

    return step, _bytes(program)


def _bytes(program: Any) -> int:
    analysis = program.memory_analysis()
    return int(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes)


def measure(axis: str, sizes: tuple[int, ...], repeats: int) -> dict[str, list[float]]:
    """Returns the fastest seconds and the bytes at every size."""
    seconds, sized = [], []
    for size in sizes:
        # The longest sequences are measured on one row.
        rows = {"batch": 1} if axis == "seq" else {}
        run, memory = training_step({**BASE, **rows, axis: size})
        run()
        seconds.append(min(_timed(run) for _ in range(repeats)))
        sized.append(memory)
    return {"sizes": list(sizes), "seconds": seconds, "bytes": sized}


def _timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns measured exponents, with a limit of the expected exponent plus noise."""
    found_rows = []
    for axis, result in record["cases"].items():
        for key, order in zip(("seconds", "bytes"), AXES[axis][1:], strict=True):
            name = "step time" if key == "seconds" else "memory"
            exponent = growth_exponent(result["sizes"], result[key])
            found_rows.append(
                Row(f"exponent of {name} in {axis}", "", "", exponent, at_most(order + NOISE))
            )
    return found_rows


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown: figures by axis, then the plot."""
    lines = []
    for axis, result in record["cases"].items():
        _, time_order, memory_order = AXES[axis]
        orders = [growth_exponent(result["sizes"], result[key]) for key in ("seconds", "bytes")]
        lines.append(
            (
                *(axis, ", ".join(f"{size:,}" for size in result["sizes"])),
                ", ".join(f"{1e3 * s:,.0f}" for s in result["seconds"]),
                f"{orders[0]:.2f} ({time_order})",
                ", ".join(f"{size / 1e6:,.0f}" for size in result["bytes"]),
                f"{orders[1]:.2f} ({memory_order})",
            )
        )
    header = ("size", "values", "step, ms", "growth (expected)", "memory, MB", "growth (expected)")
    return markdown(header, lines) + "\n\n![Step time and memory against every size](growth.svg)"


def plot(record: dict[str, Any], path: Path) -> None:
    """Plots relative time and memory against relative size, with the expected order.

    Each axis has one panel.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"
    from matplotlib import pyplot as plt

    cases = record["cases"]
    figure, panels = plt.subplots(
        2, len(cases), figsize=(2.2 * len(cases), 4.6), squeeze=False, layout="constrained"
    )
    for column, (axis, result) in enumerate(cases.items()):
        sizes = np.array(result["sizes"], float)
        for panel, key, order in zip(panels[:, column], ("seconds", "bytes"), AXES[axis][1:], strict=True):
            scale = 1e3 if key == "seconds" else 1e-6
            costs = scale * np.array(result[key])
            panel.loglog(sizes, costs, "o-", color="#1f5fa8", label="measured")
            panel.loglog(
                sizes,
                costs[-1] * (sizes / sizes[-1]) ** order,
                "--",
                color="#999999",
                label="expected order",
            )
            panel.set_xticks(sizes, [_short(size) for size in sizes], fontsize=7)
            ends = (costs.min(), costs.max())
            panel.set_yticks(ends, [f"{end:,.0f}" for end in ends])
            panel.minorticks_off()
            panel.tick_params(axis="y", labelsize=7)
        panels[0, column].set_title(axis, fontsize=10)
    panels[0, 0].set_ylabel("step, ms")
    panels[1, 0].set_ylabel("memory, MB")
    panels[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _short(size: float) -> str:
    return f"{size / 1024:g}k" if size >= 1024 else f"{size:g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axis", nargs="+", choices=tuple(AXES), default=tuple(AXES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the two smallest sizes of each axis")
    options = parser.parse_args()
    for axis in options.axis:
        sizes = AXES[axis][0][:2] if options.quick else AXES[axis][0]
        result = measure(axis, sizes, options.repeats)
        print(table(save("growth", axis, {"settings": vars(options), **result})))


if __name__ == "__main__":
    main()
