"""Stands in for gcloud: slices are lists of sandboxes, and what is sent to a worker is executed there.

Commands and options are those of the gcloud reference (compute tpus tpu-vm, compute tpus queued-resources) that deploy/
uses; others end in status 2, as gcloud's do. The state is in the folder CLOUD: a file for each slice, and a home for
each worker.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.deploy.sandbox import Machine, from_environment

ZONE = ("--zone", {"required": True})
WORKER = ("--worker", {"default": "0"})
COMMANDS: dict[tuple[str, str], tuple[tuple[str, dict], ...]] = {
    ("tpu-vm", "ssh"): (ZONE, WORKER, ("--command", {"required": True})),
    ("tpu-vm", "scp"): (ZONE, WORKER, ("destination", {}), ("--recurse", {"action": "store_true"})),
    ("tpu-vm", "delete"): (
        ZONE,
        ("--quiet", {"action": "store_true"}),
        ("--async", {"action": "store_true"}),
    ),
    ("tpu-vm", "describe"): (ZONE, ("--format", {})),
    ("queued-resources", "list"): (ZONE,),
    ("queued-resources", "describe"): (ZONE, ("--format", {})),
    ("queued-resources", "delete"): (
        ZONE,
        *((name, {"action": "store_true"}) for name in ("--force", "--quiet", "--async")),
    ),
    ("queued-resources", "create"): (
        ZONE,
        *((name, {}) for name in ("--node-id", "--node-count", "--node-prefix")),
        *((name, {"required": True}) for name in ("--accelerator-type", "--runtime-version")),
        ("--spot", {"action": "store_true"}),
    ),
}


def main(program: str, *words: str) -> int:
    """Executes one gcloud command; returns its exit status."""
    from_environment().add(program, words)
    if words[:2] != ("compute", "tpus"):
        return 0
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False)
    if words[3] != "list":
        parser.add_argument("name")
    for name, options in COMMANDS[words[2], words[3]]:
        parser.add_argument(name, **options)
    return globals()[f"{words[2]}_{words[3]}".replace("-", "_")](parser.parse_args(words[4:]))


def cloud() -> Path:
    """Returns the folder of all slices."""
    return Path(os.environ["CLOUD"])


def workers(node: str, which: str) -> list[Machine]:
    """Returns the machines of a node, all of them or one by its number."""
    settings = json.loads((cloud() / "machines.json").read_text())
    if not (cloud() / f"{node}.node").exists():
        sys.exit(f"ERROR: {node} was not found")
    names = [name for name in settings["workers"] if name.rpartition("-")[0] == node]
    chosen = names if which == "all" else [names[int(which)]]
    shared, commands = Path(settings["shared"]), Path(settings["commands"])
    machines = []
    for name in chosen:
        home = cloud() / name
        home.mkdir(exist_ok=True)
        machines.append(Machine(home, shared, commands, settings["workers"][name]))
    return machines


def tpu_vm_ssh(args: argparse.Namespace) -> int:
    """Runs a command on workers at the same time; returns the largest exit status."""
    started = [
        subprocess.Popen(machine.command(["bash", "-c", args.command]))
        for machine in workers(args.name, args.worker)
    ]
    return max(process.wait() for process in started)


def tpu_vm_scp(args: argparse.Namespace) -> int:
    """Copies a folder into the homes of workers."""
    node, _, place = args.destination.partition(":")
    assert args.recurse
    assert not place
    for machine in workers(node, args.worker):
        shutil.copytree(args.name, machine.home / Path(args.name).name, dirs_exist_ok=True)
    return 0


def tpu_vm_describe(args: argparse.Namespace) -> int:
    """Prints the state of a node."""
    if not (cloud() / f"{args.name}.node").exists():
        print(f"ERROR: {args.name} was not found", file=sys.stderr)
        return 1
    print("READY")
    return 0


def tpu_vm_delete(args: argparse.Namespace) -> int:
    """Deletes a node."""
    (cloud() / f"{args.name}.node").unlink()
    return 0


def queued_resources_create(args: argparse.Namespace) -> int:
    """Makes the nodes of a queued resource at once."""
    assert (args.node_id is None) != (args.node_count is None)
    assert (args.node_prefix is None) == (args.node_count is None)
    nodes = (
        [args.node_id] if args.node_id else [f"{args.node_prefix}-{i}" for i in range(int(args.node_count))]
    )
    (cloud() / f"{args.name}.queue").write_text(json.dumps(nodes))
    for node in nodes:
        (cloud() / f"{node}.node").touch()
    return 0


def queued_resources_describe(args: argparse.Namespace) -> int:
    """Prints the state of a queued resource, or the one that a test has written."""
    if not (cloud() / f"{args.name}.queue").exists():
        return 1
    state = cloud() / f"{args.name}.state"
    print(state.read_text() if state.exists() else "ACTIVE")
    return 0


def queued_resources_list(args: argparse.Namespace) -> int:
    """Prints the names of all queued resources."""
    print("\n".join(path.stem for path in cloud().glob("*.queue")))
    return 0


def queued_resources_delete(args: argparse.Namespace) -> int:
    """Deletes a queued resource with its nodes."""
    queue = cloud() / f"{args.name}.queue"
    if not queue.exists():
        return 1
    assert args.force
    for node in json.loads(queue.read_text()):
        (cloud() / f"{node}.node").unlink()
    queue.unlink()
    return 0
