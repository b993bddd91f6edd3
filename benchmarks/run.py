"""Runs the benchmarks of this library and writes the page docs/benchmarks.md.

    python benchmarks/run.py                               # all parts (hours), then a page of your figures
    python benchmarks/run.py --only overhead load_time     # some parts
    python benchmarks/run.py --quick                       # one short round of every part, as a test
    python benchmarks/run.py --publish                     # your figures replace the committed ones; no measurement
    python benchmarks/run.py --page                        # docs/benchmarks.md again, from the committed figures

Each part is a separate command, which measures this library next to the library that a user would
choose instead and writes raw figures to benchmarks/results/own/<machine>/<part>.json, which git
ignores. The committed figures and their page do not change until --publish (with --only, of some
parts). A failed part is reported, and the others continue. Peers come with the extra `bench`; the
options --lm-eval-python, --tunix-python, --easydel-python, --trl-path and --tpu-path name the peers
that need a separate environment: see the help of the parts multiple_choice, peers, packed and tpu.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import pages

DTYPES = ("float32", "bfloat16")
SHAPES = ("8x128", "8x256", "4x512")


@dataclass(frozen=True)
class Part:
    """A script of this folder and the arguments of its runs."""

    name: str
    runs: tuple[str, ...]  # argument lines: the published figures
    quick: str = ""  # added to every line by --quick


def _lines(*patterns: str) -> tuple[str, ...]:
    """Returns argument lines, each pattern with both dtypes in place of "{dtype}"."""
    return tuple(dict.fromkeys(pattern.format(dtype=dtype) for pattern in patterns for dtype in DTYPES))


PARTS = (
    Part(
        "versus_peft",
        (
            *_lines(*(f"--dtype {{dtype}} --shape {shape}" for shape in SHAPES)),
            *(f"--dtype bfloat16 --shape {shape} --checkpointing" for shape in SHAPES[:2]),
            "--dtype bfloat16 --shape 8x128 --bf16-mode mixed",
            "--dtype float32 --shape 8x128 --architecture qwen3.5 --peft-compile",
            "--dtype bfloat16 --shape 8x128 --architecture qwen3.5 --bf16-mode autocast32",
        ),
        "--rounds 1 --steps 2",
    ),
    Part("few_shot", _lines("--dtype {dtype}"), "--rounds 1 --steps 1 --layers 2 --batch 4"),
    Part("packed", _lines("--dtype {dtype}"), "--rounds 1 --steps 2"),
    Part(
        "peers",
        _lines("--peer Tunix --dtype {dtype}", "--peer EasyDeL --dtype {dtype}"),
        "--rounds 1 --steps 2",
    ),
    Part("overhead", _lines("--dtype {dtype}"), "--pairs 3 --layers 2"),
    Part("tpu", ("",), "--quick"),
    Part("tpu_ffn", ("",), "--topologies v5e:2x2 --tokens 2048"),
    Part(
        "flops",
        _lines(
            "--count --dtype {dtype}",
            "--peak --dtype {dtype} --shape 8x128",
            "--peak --dtype {dtype} --shape 8x256",
        ),
        "--steps 1",
    ),
    Part("loss_memory", ("",)),
    Part("first_step", _lines("--dtype {dtype}"), "--rounds 1"),
    Part(
        "load_time",
        _lines("--format safetensors --dtype {dtype}", "--format gguf --dtype {dtype}"),
        "--rounds 1",
    ),
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
    Part("accelerator", ("",), "--tiny --steps 2"),
)
NAMES = tuple(part.name for part in PARTS)


def measure(benchmark: Part, options: argparse.Namespace) -> bool:
    """Runs all lines of a part; returns True if all succeeded."""
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
    for line in benchmark.runs:
        arguments = line.split() + (benchmark.quick.split() if options.quick else [])
        for start, words in where.items():
            arguments += words if f"{benchmark.name} {line}".startswith(start) else []
        command = common.script(f"{benchmark.name}.py", *arguments)
        print("$", " ".join(["python", *command[1:]]), flush=True)
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, check=False)
        print(f"exit {done.returncode} after {time.perf_counter() - start:.0f} s", flush=True)
        succeeded &= done.returncode == 0
    return succeeded


def publish(
    names: Sequence[str], source: Path = common.OWN, published: Path = common.PUBLISHED
) -> list[Path]:
    """Replaces the committed figures by those in ``own``, by case; returns the written files."""
    written = []
    for path in sorted(source.glob("*/*.json")):
        if path.stem.removesuffix("_search") not in names:
            continue
        target = published / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        record = common.load(path.stem, target.parent)
        record["cases"] |= common.load(path.stem, path.parent)["cases"]
        common.write(target, record)
        written.append(target)
    return written


def write_pages() -> None:
    """Writes docs/benchmarks.md and notes/figures.md from the committed figures."""
    for path, text in ((pages.PAGE, pages.render(NAMES)), (pages.FIGURES, pages.details(NAMES))):
        path.write_text(text)
        print("wrote", path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, metavar="PART", help=", ".join(NAMES)
    )
    parser.add_argument("--quick", action="store_true", help="short runs; figures go to results/quick")
    parser.add_argument(
        "--publish", action="store_true", help="replace the committed figures; measures nothing"
    )
    parser.add_argument(
        "--page", action="store_true", help="write the pages from the committed figures; measures nothing"
    )
    parser.add_argument("--lm-eval-python", default=sys.executable, help="a Python that has lm-eval")
    parser.add_argument("--tunix-python", default=sys.executable, help="a Python that has google-tunix")
    parser.add_argument("--easydel-python", default=sys.executable, help="a Python that has easydel")
    parser.add_argument("--trl-path", default="", help="folders that have TRL and datasets")
    parser.add_argument("--tpu-path", default="", help="folder that libtpu was installed into")
    options = parser.parse_args()
    if options.publish or options.page:
        if options.publish:
            publish(options.only)
        write_pages()
        return
    chosen = [benchmark for benchmark in PARTS if benchmark.name in options.only]
    failed = [benchmark.name for benchmark in chosen if not measure(benchmark, options)]
    print(pages.render(NAMES, common.QUICK if options.quick else common.OWN))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
