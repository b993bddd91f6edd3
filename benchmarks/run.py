"""Every benchmark of this library, and the page docs/benchmarks.md made from what they measured.

    python benchmarks/run.py                               # all parts (hours), then the page
    python benchmarks/run.py --only overhead load_time     # some parts, then the page
    python benchmarks/run.py --quick                       # one short round of everything, to see that it works
    python benchmarks/run.py --page                        # the page alone, from the recorded figures

Each part is a command of its own, which measures this library and what a user would pick instead side by side and puts
raw figures into benchmarks/results/<machine>/<part>.json; a part that fails is reported, and the others go on. Peers
come with the extra `bench`; those that want an environment of their own are named by --lm-eval-python, --tunix-python,
--easydel-python, --trl-path and --tpu-path: see the help of the parts multiple_choice, peers, packed and tpu.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import tables

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
NOTES = Path(__file__).parent / "notes"
DTYPES = ("float32", "bfloat16")
SHAPES = ("8x128", "8x256", "4x512")


@dataclass(frozen=True)
class Part:
    """A script of this folder and the arguments of its runs."""

    name: str
    runs: tuple[str, ...]  # argument lines: the published figures
    quick: str = ""  # added to every line by --quick


def _lines(*patterns: str) -> tuple[str, ...]:
    """Argument lines, each pattern with both dtypes in place of "{dtype}"."""
    return tuple(dict.fromkeys(pattern.format(dtype=dtype) for pattern in patterns for dtype in DTYPES))


PARTS = (
    Part(
        "versus_peft",
        (
            *_lines(*(f"--dtype {{dtype}} --shape {shape}" for shape in SHAPES)),
            *(f"--dtype bfloat16 --shape {shape} --checkpointing" for shape in SHAPES[:2]),
            "--dtype bfloat16 --shape 8x128 --bf16-mode mixed",
        ),
        "--rounds 1 --steps 2",
    ),
    Part("packed", _lines("--dtype {dtype}"), "--rounds 1 --steps 2"),
    Part("peers", _lines("--peer Tunix --dtype {dtype}", "--peer EasyDeL --dtype {dtype}"), "--rounds 1 --steps 2"),
    Part("overhead", _lines("--dtype {dtype}"), "--pairs 3 --layers 2"),
    Part("tpu", ("",), "--quick"),
    Part("tpu_ffn", ("",), "--topologies v5e:2x2 --tokens 2048"),
    Part(
        "flops",
        _lines(
            "--count --dtype {dtype}", "--peak --dtype {dtype} --shape 8x128", "--peak --dtype {dtype} --shape 8x256"
        ),
        "--steps 1",
    ),
    Part("loss_memory", ("",)),
    Part("first_step", _lines("--dtype {dtype}"), "--rounds 1"),
    Part("load_time", _lines("--format safetensors --dtype {dtype}", "--format gguf --dtype {dtype}"), "--rounds 1"),
    Part("compile_time", _lines("--dtype {dtype}"), "--rounds 1"),
    Part(
        "generation",
        _lines("--dtype {dtype} --batch 1", "--dtype {dtype} --batch 16"),
        "--rounds 1 --repeats 1",
    ),
    Part(
        "multiple_choice",
        _lines("--task socialiqa --dtype {dtype}", "--task arc_easy --dtype {dtype}"),
        "--rounds 1 --repeats 1 --count 20",
    ),
    Part("quantized", ("",), "--steps 3 --questions 8"),
    Part("growth", ("",), "--quick"),
)


def measure(part: Part, options: argparse.Namespace) -> bool:
    """Runs all lines of a part; whether every one succeeded."""
    where = {  # by the start of a line
        "multiple_choice": ["--peer-python", options.lm_eval_python],
        "peers --peer Tunix": ["--peer-python", options.tunix_python],
        "peers --peer EasyDeL": ["--peer-python", options.easydel_python],
        "packed": ["--trl-path", options.trl_path],
        "tpu": ["--tpu-path", options.tpu_path],
        "tpu_ffn": ["--tpu-path", options.tpu_path],
    }
    environment = common.with_environment(
        {**common.ENVIRONMENT, **({"NALORA_BENCH_QUICK": "1"} if options.quick else {})}
    )
    succeeded = True
    for line in part.runs:
        arguments = line.split() + (part.quick.split() if options.quick else [])
        for start, words in where.items():
            arguments += words if f"{part.name} {line}".startswith(start) else []
        command = common.script(f"{part.name}.py", *arguments)
        print("$", " ".join(["python", *command[1:]]), flush=True)
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, check=False)
        print(f"exit {done.returncode} after {time.perf_counter() - start:.0f} s", flush=True)
        succeeded &= done.returncode == 0
    return succeeded


# ---------------------------------------------------------------- the page

HEADER = """# Speed and memory

Made by `python benchmarks/run.py` from `benchmarks/results/<machine>/*.json`; every section names the command of each
figure and the machine that it was measured on. Where repeated, a figure is the median, with minimum and maximum behind
it; a ratio is that of the medians, or the median of paired ratios with its 95% interval. Both sides of a comparison run
on the same machine, in turn, in processes of their own, with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`. The machines are
shared: differences below 5% mean nothing.
"""


@dataclass(frozen=True)
class Figures:
    """What was recorded of one part on one machine."""

    part: str
    module: Any  # the part's script
    record: dict[str, Any]

    @property
    def machine(self) -> str:
        """The CPU, and what it multiplies with."""
        case = next(iter(self.record["cases"].values()))
        return f"{case['machine']['cpu']}, {tables.instructions(case)}"


def recorded(folder: Path) -> list[Figures]:
    """By machine, then in the order of the parts; parts without figures of a machine are left out."""
    found = []
    for machine in sorted(path for path in folder.iterdir() if path.is_dir() and path != common.QUICK):
        for part in PARTS:
            record = common.load(part.name, machine)
            if record["cases"]:
                found.append(Figures(part.name, importlib.import_module(part.name), record))
    return found


def render(folder: Path = common.PUBLISHED, notes: Path = NOTES) -> str:
    """The page's Markdown from the recorded figures."""
    found = recorded(folder)
    machines = dict.fromkeys(figures.machine for figures in found)
    overviews = [overview(name, [figures for figures in found if figures.machine == name]) for name in machines]
    parts = [[figures for figures in found if figures.part == part.name] for part in PARTS]
    sections = [section(measured, notes) for measured in parts if measured]
    return "\n\n".join([HEADER.strip(), "## Required and measured", *overviews, *sections]) + "\n"


def overview(machine: str, found: Sequence[Figures]) -> str:
    """Every figure of a machine that something was required of; parts without figures are named."""
    lines, verdicts = [], []
    for figures in found:
        for row in figures.module.rows(figures.record):
            if row.limit is not None:
                lines.append(
                    (figures.module.TITLE, row.what, str(row.limit), tables.ratio_text(row.ratio), row.verdict)
                )
                verdicts.append(row.verdict)
    missing = [part.name for part in PARTS if part.name not in {figures.part for figures in found}]
    head = f"{verdicts.count('met')} of {len(verdicts)} measured ratios are as required."
    head += f" Not measured here: {', '.join(missing)}." if missing else ""
    table = tables.markdown(("part", "figure", "required", "measured", ""), lines)
    return f"### {machine}\n\n{head}\n\n{table}"


def section(found: Sequence[Figures], notes: Path) -> str:
    """A part's tables, one for each machine, what its figures mean, and where they come from."""
    module = found[0].module
    about = module.__doc__.strip().split("\n\n")[1:]
    prose = [block for block in about if not block.startswith(("    ", "--"))]  # neither commands nor options
    text = [f"## {module.TITLE}", *prose]
    for figures in found:
        text += [f"**{figures.machine}**", module.table(figures.record)]
    note = notes / f"{found[0].part}.md"
    if note.exists():
        text.append(note.read_text().strip())
    return "\n\n".join([*text, *(sources(figures.record) for figures in found)])


def sources(record: dict[str, Any]) -> str:
    """Commands, and the machine that each ran on."""
    commands: dict[str, list[str]] = {}
    for case in record["cases"].values():
        commands.setdefault(describe(case), []).append(f"`{case['command']}`")
    return "\n\n".join(
        f"{machine}:\n\n" + "\n".join(f"- {command}" for command in dict.fromkeys(found))
        for machine, found in commands.items()
    )


def describe(case: dict[str, Any]) -> str:
    """The machine of a case, its versions, and those of peers that ran in an environment of their own, in one line."""
    machine = case["machine"]
    flags = ", ".join(name for name, there in machine["flags"].items() if there)
    missing = "" if tables.has_amx(case) else ", no AMX"
    own = {name: runs[-1]["versions"] for name, runs in case.get("runs", {}).items() if "versions" in runs[-1]}
    versions = "; ".join(
        f"{name}{': ' if name else ''}" + ", ".join(f"{package} {version}" for package, version in found.items())
        for name, found in {"": machine["versions"], **own}.items()
    )
    return (
        f"{machine['cpu']} ({flags}{missing}), {machine['cores']} cores, {machine['memory_gb']:.0f} GB; "
        f"Python {machine['python']}, {versions}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="short runs; figures go to results/quick, not to the page")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--lm-eval-python", default=sys.executable, help="a Python that has lm-eval")
    parser.add_argument("--tunix-python", default=sys.executable, help="a Python that has google-tunix")
    parser.add_argument("--easydel-python", default=sys.executable, help="a Python that has easydel")
    parser.add_argument("--trl-path", default="", help="folders that have TRL and datasets")
    parser.add_argument("--tpu-path", default="", help="folder that libtpu was installed into")
    options = parser.parse_args()
    chosen = [] if options.page else [part for part in PARTS if part.name in options.only]
    failed = [part.name for part in chosen if not measure(part, options)]
    if options.quick:
        print(render(common.QUICK))
    else:
        PAGE.write_text(render())
        print("wrote", PAGE)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
