"""Stands in for the commands of deploy/ and docs/tpu_from_zero.md, whose calls it appends to the
file DEPLOY_RECORD.

gcloud executes what is sent to a worker in that worker's home, with the commands of the TPU VM
image alone. A slice
is a file in the folder CLOUD, NAME.queue: its state, and its nodes with two workers each. Options
that the reference of gcloud lacks (compute tpus tpu-vm, compute tpus queued-resources) end with
status 2, as there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OPTIONS = {  # those that end with "=" take a value
    ("tpu-vm", "ssh"): "--zone= --worker= --command=",
    ("tpu-vm", "scp"): "--zone= --worker= --recurse",
    ("tpu-vm", "describe"): "--zone= --format=",
    ("accelerator-types", "list"): "--zone=",
    ("queued-resources", "list"): "--zone=",
    ("queued-resources", "describe"): "--zone= --format=",
    ("queued-resources", "delete"): "--zone= --force --quiet --async",
    (
        "queued-resources",
        "create",
    ): "--zone= --node-id= --node-count= --node-prefix= --accelerator-type="
    " --runtime-version= --spot --provisioning-model= --max-run-duration=",
}
# A `nalora` whose runs wait for their SIGTERM, but for one that fails; other subcommands end at
# once.
NALORA = """#!/bin/bash
[[ $1 == train ]] || exit 0
[[ $* != *failing* ]] || exit 2
printf '%s\\0' "$@" >>"$HOME/trained"
trap 'echo "interrupted by SIGTERM; saved step 3; continue with --resume"; exit 143' TERM
echo "$HF_TOKEN: $*"
while true; do sleep 0.05; done
"""


def write(path: Path, text: str = "") -> None:
    """Writes a command: ``text``, or a stand-in for the command that ``path`` is named after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        text
        or f"#!{sys.executable} -SE\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from tests.deploy import stand_ins\nsys.exit(stand_ins.main({path.name!r}, *sys.argv[1:]))\n"
    )
    path.chmod(0o755)


def main(program: str, *words: str) -> int | str:
    """Records a call and executes it; returns its exit status, or what is wrong."""
    with Path(os.environ["DEPLOY_RECORD"]).open("a") as record:
        record.write(json.dumps([program, *words]) + "\n")
    for word in words:
        assert not word.startswith("deploy/") or (ROOT / word).exists(), word
    match program:
        case "gcloud" if words[:2] == ("compute", "tpus"):
            return tpus(*words[2:])
        case "gcloud" if words[:3] == ("alpha", "compute", "tpus"):
            return tpus(*words[3:])
        case "python3":  # of the image, which has no packages
            assert words == ("-m", "pip", "install", "--quiet", "--user", "uv"), words
            write(Path.home() / ".local" / "bin" / "uv")
        case "python3.11":
            assert words[:2] == ("-m", "venv")
            write(Path(words[2]) / "bin" / "pip")
        case "uv" if words[0] == "pip":
            assert words[1:4] == ("install", "--quiet", "--python"), words
            write(Path(words[4]).with_name("nalora"), NALORA)
    return 0


def tpus(kind: str, verb: str, *words: str) -> int | str:
    """Executes a command about slices."""
    parser, cloud = argparse.ArgumentParser(allow_abbrev=False), Path(os.environ["CLOUD"])
    parser.add_argument("names", nargs="*")
    for option in OPTIONS[kind, verb].split():
        parser.add_argument(
            option.rstrip("="), action="store" if option.endswith("=") else "store_true"
        )
    args = parser.parse_args(words)
    assert args.zone, "--zone"
    *sources, name = args.names or [""]
    queue = cloud / f"{name}.queue"
    match kind, verb:
        case "tpu-vm", _:
            homes = workers(cloud, name.rstrip(":"), args.worker if verb != "describe" else "")
            if not homes:
                return f"ERROR: {name} was not found"
            if verb == "scp":
                for home in homes:
                    shutil.copytree(sources[0], home / Path(sources[0]).name, dirs_exist_ok=True)
            else:
                started = [
                    subprocess.Popen(["bash", "-c", args.command], **on(home)) for home in homes
                ]
                return max(process.wait() for process in started)
        case "accelerator-types", _:
            pass
        case "queued-resources", "list":
            print("\n".join(path.stem for path in cloud.glob("*.queue")))
        case "queued-resources", "create":
            nodes = [f"{args.node_prefix}-{i}" for i in range(int(args.node_count or 0))]
            queue.write_text(" ".join(["ACTIVE", *(nodes or [args.node_id])]))
        case _ if not queue.exists():
            return 1
        case "queued-resources", "describe":
            print(queue.read_text().split()[0])
        case "queued-resources", "delete":
            assert args.force
            queue.unlink()
    return 0


def workers(cloud: Path, node: str, which: str) -> list[Path]:
    """Returns the homes of a node's two workers, or of one; none without such a node."""
    slices = [path.read_text().split() for path in cloud.glob("*.queue")]
    if not any(state == "ACTIVE" and node in nodes for state, *nodes in slices):
        return []
    homes = [cloud / f"{node}-{worker}" for worker in (0, 1)]
    for home in homes:
        home.mkdir(exist_ok=True)
    return homes if which == "all" else [homes[int(which or 0)]]


def on(home: Path) -> dict[str, Any]:
    """Returns the options of `Popen` for a process on the machine with this home."""
    variables = {
        name: os.environ[name] for name in ("CLOUD", "DEPLOY_RECORD", "NALORA_DELETE_AFTER")
    }
    variables |= {
        "PATH": f"{home.parent}/commands",
        "HOME": str(home),
        "USER": "me",
        "LANG": "C.UTF-8",
    }
    return {"cwd": home, "env": variables}
