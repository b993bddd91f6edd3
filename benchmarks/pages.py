"""Writes docs/benchmarks.md, one short table per machine, and notes/figures.md, all figures.

notes/figures.md has the command of every figure. Both pages are generated from the committed
figures alone (results/<machine>/<part>.json); notes/<part>.md contains hand-written notes on
profiles and experiments.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import tables

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
NOTES = Path(__file__).parent / "notes"
FIGURES = NOTES / "figures.md"
ROWS = 15  # maximum rows of a machine's table on the page
# Measured on any CPU that compiled the programs, which does not affect them.
COMPILED = {"tpu": "TPU v5e and v5p, compiled, not run", "tpu_ffn": "TPU v5e and v5p, compiled, not run"}
# Parts whose figures are all on the page, and that are not required of a machine without
# accelerators.
WHOLE = ("accelerator",)
# The main figures of each part. Figures that miss their requirement are always shown.
HEADLINES = {
    "versus_peft": (
        *(f"tokens/s, {case}" for case in ("bfloat16 8x128", "float32 8x128", "bfloat16 4x512")),
        *("tokens/s, bfloat16 8x128, PEFT's autocast, qwen3.5", "tokens/s, float32 8x128, qwen3.5"),
        *(f"peak memory, {case}" for case in ("bfloat16 8x128", "float32 8x128")),
    ),
    "packed": ("useful tokens/s, bfloat16, against PEFT packed by TRL",),
    "peers": ("tokens/s, bfloat16 8x128, Tunix",),
    "overhead": ("step, bfloat16 8x128",),
    "tpu": (
        "temporary memory per chip, Llama-3.1-8B, v5e:16x16, one sequence of 4,096 tokens a chip",
        "all memory of NA-LoRA per chip, Llama-3.1-8B, v5e:16x16, one sequence of 4,096 tokens a chip, over the chip's",
        *(
            f"{what}, v5p:2x2x4, one sequence of 2,048 tokens a chip"
            for what in ("flops per chip", "bytes accessed per chip")
        ),
    ),
    "tpu_ffn": ("roofline, v5e, 2,048 tokens", "roofline, v5p, 2,048 tokens"),
    "flops": ("flops per second: nalora, bfloat16 8x128",),
    "loss_memory": ("131,072 tokens, bfloat16 head, 8x512 x 1024",),
    "first_step": ("first step, bfloat16 8x128",),
    "generation": ("tokens/s, bfloat16, batch 1", "tokens/s, bfloat16, batch 16"),
    "multiple_choice": ("items/s, socialiqa, bfloat16",),
}

HEADER = """# Speed and memory

Figures of `benchmarks/run.py`: SmolLM2-135M, rank 8 on gate, up and down, on two CPU cores, compared with the usual
alternatives; "qwen3.5" is a Qwen3.5 of four layers and width 256, on one core. Both sides of a comparison run on the
same machine, in turn, in separate processes, with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`. A figure is the median, with
minimum and maximum in brackets; a ratio is the ratio of the medians, or the median of paired ratios. The machines are
shared: differences below 5% are noise.

**No TPU and no GPU has run this library**; [Pods and GPUs](pods.md) has figures of its compiled programs.
`python benchmarks/accelerator.py` measures tokens/s, MFU and memory on your accelerator, and compares them with PEFT on
a GPU and with Tunix on a TPU; `--publish` adds the figures to this page.

The tables show the main figures, and all figures that miss their requirement. `benchmarks/notes/figures.md` has every
figure with its command; `benchmarks/notes/<part>.md` describes profiles, and changes that gained nothing.
`python benchmarks/run.py` measures on your machine and prints this page with your figures; the committed figures stay.
The generation of one AMD EPYC was not recorded; its float32 matmuls are about twice as fast as those on Zen 4."""


@dataclass(frozen=True)
class Figures:
    """Recorded figures of one part on one machine."""

    part: str
    module: Any  # the part's script
    record: dict[str, Any]

    @property
    def machine(self) -> str:
        """Returns the CPU and its matrix instructions, the accelerators, or the compile target."""
        return COMPILED.get(self.part) or tables.machine(next(iter(self.record["cases"].values())))


def recorded(folder: Path, parts: Sequence[str]) -> list[Figures]:
    """Returns figures by machine, then in the order of the parts, without parts that have none."""
    figures = []
    apart = (common.QUICK, common.OWN)
    for machine in sorted(path for path in folder.iterdir() if path.is_dir() and path not in apart):
        for name in parts:
            record = common.load(name, machine)
            if record["cases"]:
                figures.append(Figures(name, importlib.import_module(name), record))
    return figures


def render(parts: Sequence[str], folder: Path = common.PUBLISHED) -> str:
    """Returns the page's Markdown from the recorded figures: one table per machine."""
    recorded_figures = recorded(folder, parts)
    machines = sorted(dict.fromkeys(figures.machine for figures in recorded_figures))
    overviews = [
        overview(name, [figures for figures in recorded_figures if figures.machine == name], parts)
        for name in machines
    ]
    return "\n\n".join([HEADER, *overviews]) + "\n"


def overview(machine: str, recorded_figures: Sequence[Figures], parts: Sequence[str]) -> str:
    """Returns at most `ROWS` rows of one machine; parts without figures are named."""
    lines, verdicts = [], []
    for figures in recorded_figures:
        for row in figures.module.rows(figures.record):
            verdicts += [row.verdict] if row.limit is not None else []
            missed = row.limit is not None and row.verdict != "met"
            if missed or figures.part in WHOLE or row.what in HEADLINES.get(figures.part, ()):
                cells = (
                    row.ours,
                    row.other,
                    tables.ratio_text(row.ratio),
                    str(row.limit or ""),
                    row.verdict,
                )
                lines.append((missed, (figures.module.SHORT, row.what, *cells)))
    while len(lines) > ROWS:  # the last that meets its requirement
        lines.pop(max(i for i, (missed, _) in enumerate(lines) if not missed))
    compiled = machine in COMPILED.values()
    accelerated = all(figures.part in WHOLE for figures in recorded_figures)
    there = (*COMPILED, *WHOLE, *(figures.part for figures in recorded_figures))
    missing = [name for name in parts if name not in there]
    head = f"{verdicts.count('met')} of {len(verdicts)} measured ratios are as required."
    head += (
        f" Not measured here: {', '.join(missing)}." if missing and not compiled and not accelerated else ""
    )
    header = ("part", "figure", "nalora_jax", "reference", "ratio", "required", "")
    return f"## {machine}\n\n{head}\n\n{tables.markdown(header, [cells for _, cells in lines])}"


def details(parts: Sequence[str], folder: Path = common.PUBLISHED) -> str:
    """Returns every figure with its command, by part."""
    recorded_figures = recorded(folder, parts)
    by_part = [[figures for figures in recorded_figures if figures.part == name] for name in parts]
    head = (
        "# Every figure\n\nMade by `python benchmarks/run.py --publish` (or `--page`) from `benchmarks/results`; "
        "docs/benchmarks.md says how they were measured and shows the first of them."
    )
    return "\n\n".join([head, *(section(measured) for measured in by_part if measured)]) + "\n"


def section(recorded_figures: Sequence[Figures]) -> str:
    """Returns a part's tables, one per machine, and the origin of the figures."""
    module = recorded_figures[0].module
    about = module.__doc__.strip().split("\n\n")[1:]
    prose = [
        block for block in about if not block.startswith(("    ", "--"))
    ]  # neither commands nor options
    text = [f"## {module.TITLE}", *prose]
    for figures in recorded_figures:
        text += [f"**{figures.machine}**", module.table(figures.record)]
    if (NOTES / f"{recorded_figures[0].part}.md").exists():
        text.append(
            f"What profiles showed, and what was tried: [{recorded_figures[0].part}.md]({recorded_figures[0].part}.md)."
        )
    return "\n\n".join([*text, *(sources(figures.record) for figures in recorded_figures)])


def sources(record: dict[str, Any]) -> str:
    """Returns the commands, and the machine that each ran on."""
    commands: dict[str, list[str]] = {}
    for case in record["cases"].values():
        commands.setdefault(describe(case), []).append(f"`{case['command']}`")
    return "\n\n".join(
        f"{machine}:\n\n" + "\n".join(f"- {command}" for command in dict.fromkeys(used))
        for machine, used in commands.items()
    )


def describe(case: dict[str, Any]) -> str:
    """Returns a case's machine and versions in one line, with those of separate environments."""
    machine = case["machine"]
    flags = ", ".join(name for name, there in machine["flags"].items() if there)
    missing = "" if tables.has_amx(case) else ", no AMX"
    separate = {
        name: runs[-1]["versions"] for name, runs in case.get("runs", {}).items() if "versions" in runs[-1]
    }
    versions = "; ".join(
        f"{name}{': ' if name else ''}"
        + ", ".join(f"{package} {version}" for package, version in number.items())
        for name, number in {"": machine["versions"], **separate}.items()
    )
    design = f" {machine['generation']}" if machine.get("generation") else ""
    cores = "core" if machine["cores"] == 1 else "cores"
    return (
        f"{machine['cpu']}{design} ({flags}{missing}), {machine['cores']} {cores}, {machine['memory_gb']:.0f} GB; "
        f"Python {machine['python']}, {versions}"
    )
