"""Every command of docs/tpu_from_zero.md executed with stand-ins; the README's on pods and GPUs are among them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from nalora_jax.cli.command import parse
from nalora_jax.config import check
from nalora_jax.layout.machines import topology
from tests.deploy import sandbox

PAGE = sandbox.ROOT / "docs" / "tpu_from_zero.md"
README = sandbox.ROOT / "README.md"
# Records the flags of a run, which waits for its SIGTERM; other subcommands end at once.
NALORA = """#!/bin/bash
[[ $1 == train ]] || exit 0
printf '%s\\0' "$@" >> "$HOME/trained"
trap 'exit 143' TERM
while true; do sleep 0.05; done
"""


def commands(path: Path) -> str:
    """Returns the commands of a page; of the README those of the section that launches runs."""
    text = path.read_text()
    if path == README:
        text = text.split("## Pods and GPUs\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def one_by_one(text: str) -> list[list[str]]:
    """Returns the words of each command of a text."""
    return [
        shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines() if line.strip()
    ]


def check_train(words: list[str]) -> None:
    """Parses the arguments of `nalora train`, as the command line does."""
    verb, args = parse(words)
    assert verb == "train"
    check(args.run)


def test_the_commands_run_in_their_order_and_leave_no_slice_behind(make_cloud) -> None:
    cloud = make_cloud("my-slice", "pair-0", "pair-1", program=NALORA)
    for worker in cloud.settings["workers"].values():
        worker["NALORA_DELETE_AFTER"] = "60"  # the slice serves the rest of the page
    cloud.save()
    names = ("docker", "kubectl", "sbatch", "nalora", "pip", "python3.11")
    for name in (*names, "ssh-keygen", "ssh-agent", "ssh-add"):
        sandbox.write_program(cloud.laptop / name, "tools")
    script = f"set -euo pipefail\n{commands(PAGE)}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=sandbox.ROOT,
        env=cloud.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(cloud.folder.glob("*.node"))
    started = [path.read_text().split("\0train\0") for path in cloud.folder.glob("*/trained")]
    assert len(started) >= 2
    for text in {text for texts in started for text in texts}:
        check_train(["train", *text.removeprefix("train\0").strip("\0").split("\0")])
    for call in cloud.record.calls():
        check_call(call)


def check_call(call: list[str]) -> None:
    """Checks what a stand-in was called with."""
    name, *words = call
    if name == "nalora":
        parse(words)
    elif name == "sbatch":
        place = words.index("deploy/slurm.sbatch")
        assert set(words[:place:2]) <= {"--nodes", "--ntasks-per-node", "--gpus-per-node"}
        flags = words[place + 1 :]
        check_train(["train", "--resume", "auto", *flags])
    elif name == "docker" and words[0] == "run":
        check_train(words[words.index("train") :])
    elif name == "kubectl" and "-f" in words:
        assert (sandbox.ROOT / words[words.index("-f") + 1]).exists()
    elif name == "kubectl" and words[0] == "logs":
        resource = yaml.safe_load((sandbox.ROOT / "deploy" / "jobset.yaml").read_text())
        labels = dict(label.split("=") for label in words[-1].split(","))
        assert labels.pop("jobset.sigs.k8s.io/jobset-name") == resource["metadata"]["name"]
        assert labels == {"batch.kubernetes.io/job-completion-index": "0"}


def test_the_commands_of_the_readme_are_those_of_the_page() -> None:
    listed = [" ".join(words) for words in one_by_one(commands(PAGE))]
    for words in one_by_one(commands(README)):
        assert " ".join(words) in listed


def test_the_table_of_types_has_topologies_that_plan_knows_and_prices_by_chip() -> None:
    rows = re.findall(
        r"^\| `(\S+)` \| (\d+) (\w+) \| (\d+) \| `(\S+)` \| ([\d.]+) \|$", PAGE.read_text(), re.MULTILINE
    )
    assert len(rows) == 8
    for name, chips, kind, hosts, shape, price in rows:
        assert topology(shape).size == int(chips), name
        assert shape.startswith(f"{kind}:")
        assert float(price) == pytest.approx(int(chips) * {"v5e": 1.2, "v6e": 2.7, "v5p": 4.2}[kind])
        assert int(chips) / int(hosts) in (4, 8)
