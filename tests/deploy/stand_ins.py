"""Stands in for the commands of deploy/ and docs/tpu_from_zero.md, whose calls it appends to the file DEPLOY_RECORD.

gcloud executes what is sent to a worker in that worker's home, with the commands of the TPU VM image alone. Slices are
files in the folder CLOUD: NODE.node, NAME.queue with its nodes, and NAME.state if a test sets it. Options that the
reference of gcloud lacks (compute tpus tpu-vm, compute tpus queued-resources) end with status 2, as there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Of the image (Ubuntu 22.04) what deploy/ uses. Neither python3.11 nor gcsfuse is among its commands.
IMAGE = (
    "bash cat cp cut date dirname env grep gzip hostname mkdir nohup rm sed setsid sha256sum sleep tail tar"
)
OPTIONS = {  # those that end with "=" take a value
    ("tpu-vm", "ssh"): "--zone= --worker= --command=",
    ("tpu-vm", "scp"): "--zone= --worker= --recurse",
    ("tpu-vm", "delete"): "--zone= --quiet --async",
    ("tpu-vm", "describe"): "--zone= --format=",
    ("queued-resources", "list"): "--zone=",
    ("queued-resources", "describe"): "--zone= --format=",
    ("queued-resources", "delete"): "--zone= --force --quiet --async",
    ("queued-resources", "create"): "--zone= --node-id= --node-count= --node-prefix= --accelerator-type="
    " --runtime-version= --spot",
}
NALORA = (
    "#!{}\nimport sys\nsys.path.insert(0, {!r})\nfrom nalora_jax.__main__ import main\nsys.exit(main())\n"
)


def write(path: Path) -> None:
    """Writes a stand-in for the command that ``path`` is named after."""
    path.write_text(
        f"#!{sys.executable} -SE\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from tests.deploy import stand_ins\nsys.exit(stand_ins.main({path.name!r}, *sys.argv[1:]))\n"
    )
    path.chmod(0o755)


def main(program: str, *words: str) -> int | str:
    """Records a call and executes it; returns its exit status, or what is wrong."""
    with Path(os.environ["DEPLOY_RECORD"]).open("a") as record:
        record.write(json.dumps([program, *words]) + "\n")
    for word in words:
        if word.startswith(("deploy/", "benchmarks/")):
            assert (ROOT / word).exists(), word
    match program:
        case "gcloud" if words[:2] == ("compute", "tpus"):
            return tpus(*words[2:])
        case "python3":  # of the image, which has no packages
            assert words == ("-m", "pip", "install", "--quiet", "--user", "uv"), words
            make_command(Path.home() / ".local" / "bin" / "uv")
        case "python3.11":
            assert words[:2] == ("-m", "venv")
            make_command(Path(words[2]) / "bin" / "pip")
        case "uv" if words[0] == "venv":
            assert words[1:-1] == ("--quiet", "--python", "3.11"), words
            (Path(words[-1]) / "bin").mkdir(parents=True)
        case "uv":
            assert words[:4] == ("pip", "install", "--quiet", "--python"), words
            install(Path(words[4]).parent, *words[5:])
    return 0


def make_command(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)


def install(commands: Path, jax: str, package: str) -> None:
    """Checks versions and extras against the copied source, and writes the command `nalora`, or a test's program."""
    source, extras = re.fullmatch(r"(.+)\[([\w,]+)\]", package).groups()
    project = tomllib.loads((Path(source) / "pyproject.toml").read_text())["project"]
    accelerator, *others = extras.split(",")
    assert {accelerator, *others} <= project["optional-dependencies"].keys(), extras
    pinned = re.fullmatch(r"(jax\[\w+\])==0\.\d+\.\d+", jax)[1]
    assert project["optional-dependencies"][accelerator][0].startswith(pinned), jax
    assert (Path(source) / project["readme"]).exists()
    program = os.environ.get("NALORA_PROGRAM") or NALORA.format(sys.executable, source)
    (commands / "nalora").write_text(program)
    (commands / "nalora").chmod(0o755)


def tpus(kind: str, verb: str, *words: str) -> int | str:
    """Executes a command about slices."""
    parser, cloud = argparse.ArgumentParser(allow_abbrev=False), Path(os.environ["CLOUD"])
    parser.add_argument("names", nargs="*")
    for option in OPTIONS[kind, verb].split():
        parser.add_argument(option.rstrip("="), action="store" if option.endswith("=") else "store_true")
    args = parser.parse_args(words)
    assert args.zone, "--zone"
    *sources, name = args.names or [""]
    node, queue = cloud / f"{name.rstrip(':')}.node", cloud / f"{name}.queue"
    match kind, verb:
        case "tpu-vm", "ssh" | "scp" | "delete" | "describe" if not node.exists():
            return f"ERROR: {name} was not found"
        case "tpu-vm", "ssh":
            command = ["bash", "-c", args.command]
            started = [subprocess.Popen(on(home, *command)) for home in workers(node, args.worker)]
            return max(process.wait() for process in started)
        case "tpu-vm", "scp":
            for home in workers(node, args.worker):
                shutil.copytree(sources[0], home / Path(sources[0]).name, dirs_exist_ok=True)
        case "tpu-vm", "delete":
            node.unlink()
        case "tpu-vm", "describe":
            print("READY")
        case "queued-resources", "list":
            print("\n".join(path.stem for path in cloud.glob("*.queue")))
        case "queued-resources", "create":
            nodes = [args.node_id] if args.node_id else []
            nodes += [f"{args.node_prefix}-{i}" for i in range(int(args.node_count or 0))]
            queue.write_text("\n".join(nodes))
            for one in nodes:
                (cloud / f"{one}.node").touch()
        case _ if not queue.exists():
            return 1
        case "queued-resources", "describe":
            state = cloud / f"{name}.state"
            print(state.read_text() if state.exists() else "ACTIVE")
        case "queued-resources", "delete":
            assert args.force
            for one in queue.read_text().split():
                (cloud / f"{one}.node").unlink()
            queue.unlink()
    return 0


def workers(node: Path, which: str | None) -> list[Path]:
    """Returns the homes of a node's two workers, or of one."""
    homes = [node.with_name(f"{node.stem}-{worker}") for worker in (0, 1)]
    for home in homes:
        home.mkdir(exist_ok=True)
    return homes if which == "all" else [homes[int(which or 0)]]


def on(home: Path, *words: str) -> list[str]:
    """Returns the command that runs ``words`` on the machine with this home."""
    variables = json.loads((home.parent / "workers.json").read_text())[home.name]
    variables |= {"HOME": str(home), "USER": "me", "LANG": "C.UTF-8"}
    assigned = [f"{name}={value}" for name, value in variables.items()]
    return ["/usr/bin/env", "-i", "-C", str(home), *assigned, *words]
