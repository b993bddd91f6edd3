"""The table of docs/long_rows.md: the longest row that fits each machine, by the estimates of `nalora plan`.

    python benchmarks/longest_rows.py          # a minute, no accelerator and no compiler

Lengths are doubled from 32,768 tokens until no layout fits. The estimates of docs/pods.md are up to
28% below the compiled memory of long rows, so a layout counts as fitting only with that margin.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from markers import write_between

from nalora_jax.cli.planning.program import CONFIGS
from nalora_jax.config import DataConfig, RunConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout.layouts import Layout, fitting, preferred
from nalora_jax.layout.machines import topology
from nalora_jax.models.config import ModelConfig

PAGE = Path(__file__).parents[1] / "docs" / "long_rows.md"
START, END = "<!-- table: benchmarks/longest_rows.py -->", "<!-- end of table -->"
MARGIN = 1.28
# huggingface.co/Qwen/Qwen3-8B
QWEN3_8B = CONFIGS["qwen3-32b"] | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
MODELS = {"qwen3-8b": QWEN3_8B, **{name: CONFIGS[name] for name in ("qwen3-32b", "llama-3.1-70b")}}
MACHINES = ("v5e:4x4", "v6e:2x4", "v6e:8x8", "v5p:2x2x4", "8xh100")
SHORTEST, LONGEST = 2**15, 2**23


def layout_for(base: ModelConfig, machine: str, seq: int) -> Layout | None:
    """Returns the fastest layout for one row of ``seq`` tokens, or None if none fits."""
    where = topology(machine)
    config = RunConfig(train=TrainConfig(batch_size=1), data=DataConfig(max_length=seq))
    try:
        layouts = fitting(config, base, where)
    except NaloraError:
        return None
    layouts = [layout for layout in layouts if MARGIN * layout.memory <= where.chip.memory]
    return preferred(layouts) if layouts else None


def longest(base: ModelConfig, machine: str) -> str:
    """Returns the cells of the longest row."""
    best = None
    seq = SHORTEST
    while seq <= LONGEST and (layout := layout_for(base, machine, seq)) is not None:
        best = (seq, layout)
        seq *= 2
    if best is None:
        return "less than 32,768 | | |"
    seq, layout = best
    memory = f"{layout.memory / 1e9:.0f} + {layout.host / 1e9:.0f}"
    return f"{seq:,} | {layout.short} | {memory} | {layout.seconds:,.0f} s"


def main() -> None:
    """Writes the table into the page."""
    lines = [
        "| model | machine | tokens | layout | GB a chip + its host | step, at least |",
        "|---|---|---|---|---|---|",
    ]
    for name, raw in MODELS.items():
        base = replace(ModelConfig.from_hf(raw, name), max_positions=LONGEST)
        lines += [f"| {name} | {machine} | {longest(base, machine)} |" for machine in MACHINES]
    write_between(PAGE, START, END, "\n".join(lines))


if __name__ == "__main__":
    main()
