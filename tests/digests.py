"""Digests of the adapters of fixed runs, and their comparison with another checkout on the same
machine.

    python -m tests.digests                            # a line for each run
    # the same runs in both; exits with 1 if an adapter differs
    python -m tests.digests --against ../other
    python -m tests.digests text dpo --devices 8       # some of them

A change that moves code must leave every adapter equal. One that reorders additions may change the
last bits: then the largest relative difference of an update, ||dW - dW'|| / ||dW'||, is printed.
Runs are started by command line, on models and data that are written once for both checkouts, so
modules may move between them. Each checkout has its own cache, in which only downloads are shared.
Digests depend on the machine: compare checkouts, not machines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from nalora_jax.common.downloads import cache_dir
from tests import tiny, vision

HERE = Path(__file__).resolve().parents[1]
TINY = (
    "--steps 4 --train.batch-size 8 --train.log-every 1 --train.eval-every 0 --train.save-every 4"
    " --data.eval-limit 4 --data.select-limit 2 --data.workers 1 --optimizer.learning-rate 1e-2"
    " --compute.dtype float32 --compute.no-compilation-cache"
    " --mechanisms soft:power=2,warmup=2 homogeneity:warmup=2 --compute.stats-stride 1"
)
TEXT = "--model {inputs}/llama --data.dataset {inputs}/questions.jsonl --data.max-length 16"
TOWERS = "--mesh.data 4 --mesh.fsdp 2"
# Flags, and more of them on eight devices.
RUNS = {
    "main": ("--steps 20 --data.eval-limit 8 --data.select-limit 4", "--mesh.data -1"),
    "text": (
        f"{TEXT} {TINY} --lora.rules ffn:4 attn:2 --lora.dropout 0.1",
        "--mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2",
    ),
    "chat": (
        "--model {inputs}/llava --data.dataset {inputs}/pictures/chats.jsonl --data.max-length 96 --data.chat"
        f" --vision.task chat {TINY} --lora.rules image/.*ffn:2 projector:4 layers/.*:8",
        TOWERS,
    ),
    "dpo": (
        "--model {inputs}/llama --data.dataset {inputs}/pairs.jsonl --data.max-length 24 --preference.loss dpo"
        f" {TINY} --lora.rules ffn:4 q_proj:2",
        TOWERS,
    ),
    "dual": (
        "--model {inputs}/clip --data.dataset {inputs}/pictures --vision.task contrast"
        f" --data.train-split train[:36] --data.eval-split train[36:] {TINY} --lora.rules ffn:4 attn:2",
        TOWERS,
    ),
    "sweep": (
        f"{TEXT} {TINY} --lora.rules ffn:4 --sweep optimizer.learning-rate=1e-2,2e-2 --sweep seed=0,1",
        "--mesh.run 4 --mesh.data 2",
    ),
}


def write_inputs(folder: Path) -> None:
    """Writes tiny random models as transformers saves them, and data for each kind of run."""
    tiny.make_model(folder / "llama")
    questions = map(
        json.loads, tiny.make_questions(folder / "questions.jsonl").read_text().splitlines()
    )
    pairs = [
        json.dumps({"prompt": one["prompt"], "chosen": " z", "rejected": f" {one['choices'][0]}"})
        for one in questions
    ]
    (folder / "pairs.jsonl").write_text("\n".join(pairs) + "\n")
    vision.make_vision_model(folder / "llava", "llava")
    vision.make_dual(folder / "clip", "clip")
    (folder / "pictures").mkdir()
    vision.make_chats(folder / "pictures")


def train(checkout: Path, name: str, inputs: Path, scratch: Path, devices: int) -> dict[str, Path]:
    """Executes a run in a checkout and returns the folders of its adapters by name."""
    cache = scratch / "cache"
    if not cache.exists():  # with copies of the compiled kernels and links to the downloads
        tiny.new_cache(cache)
        for folder in ("packages", "wheels"):
            (cache_dir() / folder).mkdir(parents=True, exist_ok=True)
            (cache / folder).symlink_to(cache_dir() / folder)
    output = Path(tempfile.mkdtemp(dir=scratch)) / "run"
    flags, on_eight = RUNS[name]
    command = [
        str(checkout / "train.py"),
        *flags.format(inputs=inputs).split(),
        "--output",
        str(output),
    ]
    command += on_eight.split() if devices == 8 else ["--mesh.data", "1"]
    variables = {"NALORA_CACHE": str(cache), "PYTHONPATH": str(checkout), "NPROC": "32"}
    variables["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(name != "main"))
    ((status, _, error),) = tiny.finish(
        tiny.start(command, devices=devices, **variables), timeout=3600
    )
    if status:
        raise SystemExit(f"{' '.join(command)}\nended with {status}:\n{error[-4000:]}")
    folders = sorted(path.parent for path in output.rglob("adapter/adapter_model.safetensors"))
    return {str(folder.parent.relative_to(output)): folder for folder in folders}


def digest(adapter: Path) -> str:
    """Returns a digest of an adapter's tensors: names, dtypes, shapes and bytes."""
    whole = hashlib.sha256()
    for name, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items()):
        whole.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        whole.update(np.ascontiguousarray(tensor).tobytes())
    return whole.hexdigest()[:16]


def updates(adapter: Path) -> dict[str, np.ndarray]:
    """Returns the product B A of each module, and other tensors as they are."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    arrays = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    for name in [name for name, array in arrays.items() if "lora_A" in name and array.ndim == 2]:
        arrays[name] = arrays.pop(name.replace("lora_A", "lora_B")) @ arrays[name]
    return arrays


def difference(adapter: Path, other: Path) -> str:
    """Returns "equal", or what differs: settings, tensors, or the largest relative difference of an
    update."""
    settings, others = (
        json.loads((one / "adapter_config.json").read_text()) for one in (adapter, other)
    )
    names = sorted({*settings, *others})
    notes = [f"{name} differs" for name in names if settings.get(name) != others.get(name)]
    if digest(adapter) != digest(other):
        first, second = updates(adapter), updates(other)
        if {name: x.shape for name, x in first.items()} != {
            name: x.shape for name, x in second.items()
        }:
            return "; ".join([*notes, "other tensors"])
        norm = np.linalg.norm
        far = {
            name: norm(x - second[name]) / max(norm(second[name]), 1e-30)
            for name, x in first.items()
        }
        name = max(far, key=far.__getitem__)
        notes.append(f"updates differ by up to {far[name]:.2e} ({name})")
    return "; ".join(notes) or "equal"


def main() -> int:
    """Prints the digests, and with --against their comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"{', '.join(RUNS)}; by default all")
    parser.add_argument("--devices", type=int, nargs="+", choices=(1, 8), default=(1, 8))
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="the other checkout")
    args = parser.parse_args()
    if unknown := set(args.runs) - set(RUNS):
        parser.error(f"RUN: expected {', '.join(RUNS)}, found {', '.join(sorted(unknown))}")
    checkouts = [HERE, *([args.against.resolve()] if args.against else [])]
    if not (checkouts[-1] / "train.py").exists():
        parser.error(f"{checkouts[-1]}: expected a checkout of this repository, found no train.py")
    differ = False
    with tempfile.TemporaryDirectory(prefix="nalora-digests-") as root:
        inputs, *places = (
            Path(root) / name for name in ("inputs", "here", "there")[: 1 + len(checkouts)]
        )
        for folder in (inputs, *places):
            folder.mkdir()
        write_inputs(inputs)
        for name in args.runs or RUNS:
            for devices in args.devices:
                here, *there = (
                    train(checkout, name, inputs, place, devices)
                    for checkout, place in zip(checkouts, places, strict=True)
                )
                for part, adapter in here.items():
                    line = f"{name:6} {devices} device{'s'[: devices > 1]:1}  {digest(adapter)}"
                    for adapters in there:
                        verdict = (
                            difference(adapter, adapters[part])
                            if part in adapters
                            else "missing there"
                        )
                        differ |= verdict != "equal"
                        line += f"  {verdict}"
                    print(line + (f"  {part}" if part != "." else ""), flush=True)
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
