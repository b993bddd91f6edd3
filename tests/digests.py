"""Digests of the adapters of fixed runs, and their comparison with another checkout on the same machine.

    python -m tests.digests                            # a line for each run
    python -m tests.digests --against ../other         # the same runs in both; exits with 1 if an adapter differs
    python -m tests.digests text dpo --devices 8       # some of them

A change that moves code must leave every adapter equal. One that reorders additions may change the last bits: then the
largest relative difference of an update, ||dW - dW'|| / ||dW'||, is printed. Runs are started by command line, on
models and data that are written once for both checkouts, so modules may move between them. Each checkout has its own
cache, in which only downloads are shared. Digests depend on the machine: compare checkouts, not machines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from nalora_jax.common.downloads import cache_dir
from tests import seeing, tiny

HERE = Path(__file__).resolve().parents[1]
DEVICES = (1, 8)
TINY = "--steps 4 --train.batch-size 8 --train.log-every 1 --train.eval-every 0 --train.save-every 4"
TINY += " --data.eval-limit 4 --data.select-limit 2 --data.workers 1 --optimizer.learning-rate 1e-2"
TINY += " --compute.dtype float32 --compute.no-compilation-cache"
NALORA = "--mechanisms soft:power=2,warmup=2 homogeneity:warmup=2 --compute.stats-stride 1"


@dataclass(frozen=True)
class Run:
    """A run: its program, its flags with names of inputs in braces, and more flags on eight devices."""

    program: str
    flags: str
    on_eight: str

    def arguments(self, inputs: Path, output: Path, devices: int) -> list[str]:
        flags = self.flags + (f" {self.on_eight}" if devices == 8 else " --mesh.data 1")
        return [*self.program.split(), *flags.format(inputs=inputs).split(), "--output", str(output)]


TEXT = "--model {inputs}/llama --data.dataset {inputs}/questions.jsonl --data.max-length 16"
RUNS = {
    "main": Run("train.py", "--steps 20 --data.eval-limit 8 --data.select-limit 4", "--mesh.data -1"),
    "text": Run(
        "-m nalora_jax train",
        f"{TEXT} {TINY} {NALORA} --lora.rules ffn:4 attn:2 --lora.dropout 0.1",
        "--mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2",
    ),
    "chat": Run(
        "-m nalora_jax train",
        "--model {inputs}/llava --data.dataset {inputs}/pictures/chats.jsonl --data.max-length 96"
        " --data.chat --vision.task chat"
        f" {TINY} {NALORA} --lora.rules image/.*ffn:2 projector:4 layers/.*:8",
        "--mesh.data 4 --mesh.fsdp 2",
    ),
    "dpo": Run(
        "-m nalora_jax train",
        "--model {inputs}/llama --data.dataset {inputs}/pairs.jsonl --data.max-length 24 --preference.loss dpo"
        f" {TINY} {NALORA} --lora.rules ffn:4 q_proj:2",
        "--mesh.data 4 --mesh.fsdp 2",
    ),
    "dual": Run(
        "-m nalora_jax train",
        "--model {inputs}/clip --data.dataset {inputs}/pictures --vision.task contrast"
        " --data.train-split train[:36] --data.eval-split train[36:]"
        f" {TINY} {NALORA} --lora.rules ffn:4 attn:2",
        "--mesh.data 4 --mesh.fsdp 2",
    ),
    "sweep": Run(
        "-m nalora_jax train",
        f"{TEXT} {TINY} {NALORA} --lora.rules ffn:4 --sweep optimizer.learning-rate=1e-2,2e-2 --sweep seed=0,1",
        "--mesh.run 4 --mesh.data 2",
    ),
}


def write_inputs(folder: Path) -> None:
    """Writes tiny random models as transformers saves them, and data for each kind of run."""
    tiny.make_model(folder / "llama")
    questions = map(json.loads, tiny.make_questions(folder / "questions.jsonl").read_text().splitlines())
    pairs = [
        {"prompt": one["prompt"], "chosen": " z", "rejected": f" {one['choices'][0]}"} for one in questions
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    seeing.make_seeing(folder / "llava", "llava")
    seeing.make_dual(folder / "clip", "clip")
    (folder / "pictures").mkdir()
    seeing.make_chats(folder / "pictures")


def make_cache(cache: Path) -> None:
    """Makes a folder to be NALORA_CACHE, with copies of the compiled kernels and links to the downloads."""
    tiny.new_cache(cache)
    for name in ("packages", "wheels"):
        (cache_dir() / name).mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(cache_dir() / name)


def train(checkout: Path, run: Run, inputs: Path, scratch: Path, devices: int) -> dict[str, Path]:
    """Executes a run in a checkout and returns the folders of its adapters by name."""
    cache = scratch / "cache"
    if not cache.exists():
        make_cache(cache)
    output = Path(tempfile.mkdtemp(dir=scratch)) / "run"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "NALORA_CACHE": str(cache),
        "PYTHONPATH": str(checkout),
    }
    # As in tests/conftest.py: eight devices on a busy machine meet late, and need more threads than there are cores.
    waits = (
        "--xla_cpu_collective_call_terminate_timeout_seconds=900 --xla_cpu_collective_timeout_seconds=900"
    )
    environment |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {waits}", "NPROC": "32"}
    if run.program != "train.py":
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # tiny programs compile in half the time
    command = [sys.executable, *run.arguments(inputs, output, devices)]
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"{checkout}: {' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}"
        )
    folders = sorted(
        path.parent for path in output.rglob("adapter_model.safetensors") if path.parent.name == "adapter"
    )
    return {str(folder.parent.relative_to(output)): folder for folder in folders}


def digest(adapter: Path) -> str:
    """Returns a digest of an adapter's tensors: names, dtypes, shapes and bytes."""
    whole = hashlib.sha256()
    for name, tensor in sorted(_tensors(adapter).items()):
        whole.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        whole.update(np.ascontiguousarray(tensor).tobytes())
    return whole.hexdigest()[:16]


def _tensors(adapter: Path) -> dict[str, np.ndarray]:
    return load_file(adapter / "adapter_model.safetensors")


def _updates(adapter: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the product B A of each module, and other tensors as they are."""
    tensors = _tensors(adapter)
    for name, tensor in tensors.items():
        second = name.replace("lora_A", "lora_B")
        if second != name and tensor.ndim == 2:
            yield name, tensors[second].astype(np.float64) @ tensor.astype(np.float64)
        elif "lora_B" not in name:
            yield name, tensor.astype(np.float64)


def difference(adapter: Path, other: Path) -> str:
    """Returns "equal", or what differs: settings, tensors, or the largest relative difference of an update."""
    notes = []
    settings, others = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, other)
    )
    if names := [name for name in sorted({*settings, *others}) if settings.get(name) != others.get(name)]:
        notes.append(f"adapter_config.json differs in {', '.join(names)}")
    first, second = dict(_updates(adapter)), dict(_updates(other))
    shapes, other_shapes = (
        {name: update.shape for name, update in side.items()} for side in (first, second)
    )
    if shapes != other_shapes:
        notes.append("other tensors")
    elif digest(adapter) != digest(other):
        distances = {
            name: float(np.linalg.norm(update - second[name]) / max(np.linalg.norm(second[name]), 1e-30))
            for name, update in first.items()
        }
        name = max(distances, key=distances.__getitem__)
        notes.append(f"updates differ by up to {distances[name]:.2e} ({name})")
    return "; ".join(notes) or "equal"


def main() -> int:
    """Prints the digests, and with --against their comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"{', '.join(RUNS)}; by default all")
    parser.add_argument("--devices", type=int, nargs="+", choices=DEVICES, default=DEVICES)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="the other checkout")
    args = parser.parse_args()
    if unknown := set(args.runs) - set(RUNS):
        parser.error(f"RUN: expected {', '.join(RUNS)}, found {', '.join(sorted(unknown))}")
    checkouts = [HERE, *([args.against.resolve()] if args.against else [])]
    for checkout in checkouts:
        if not (checkout / "nalora_jax" / "__main__.py").exists():
            parser.error(
                f"{checkout}: expected a checkout of this repository, found no nalora_jax/__main__.py"
            )
    began, differ = time.monotonic(), False
    with tempfile.TemporaryDirectory(prefix="nalora-digests-") as root:
        inputs = Path(root) / "inputs"
        inputs.mkdir()
        write_inputs(inputs)
        places = [Path(root) / str(index) for index in range(len(checkouts))]
        for place in places:
            place.mkdir()
        for name in args.runs or RUNS:
            for devices in args.devices:
                sides = [
                    train(checkout, RUNS[name], inputs, place, devices)
                    for checkout, place in zip(checkouts, places, strict=True)
                ]
                for part, adapter in sides[0].items():
                    line = f"{name:6} {devices} device{'s'[: devices > 1]:1}  {digest(adapter)}"
                    if args.against:
                        verdict = (
                            difference(adapter, sides[1][part]) if part in sides[1] else "missing there"
                        )
                        differ |= verdict != "equal"
                        line += f"  {verdict}"
                    print(line + (f"  {part}" if part != "." else ""), flush=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (used.ru_utime + used.ru_stime) / 60
    print(f"{(time.monotonic() - began) / 60:.1f} minutes, {cpu:.1f} CPU minutes", file=sys.stderr)
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
