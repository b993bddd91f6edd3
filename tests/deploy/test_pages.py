"""Every command of docs/tpu_from_zero.md executed with stand-ins; the README's on pods and GPUs are
among them."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import yaml

from nalora_jax.cli.command import parse
from nalora_jax.kinds.record import check_run_config
from nalora_jax.planner.machines import topology
from tests.deploy import stand_ins

ROOT = stand_ins.ROOT
PAGE = ROOT / "docs" / "tpu_from_zero.md"
OTHERS = "docker kubectl sbatch nalora pip python3.11 ssh-keygen ssh-agent ssh-add"


def commands(text: str) -> str:
    """Returns the commands of a page."""
    return "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def one_by_one(text: str) -> list[str]:
    """Returns each command of a text, its words joined by one blank."""
    lines = commands(text).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def check_train(words: list[str]) -> None:
    """Parses the arguments of `nalora train`, as the command line does."""
    verb, args = parse(words)
    assert verb == "train"
    check_run_config(args.run)


def test_the_commands_run_in_their_order_and_leave_no_slice_behind(cloud) -> None:
    for name in OTHERS.split():
        stand_ins.write(cloud.laptop / name)
    script = f"set -euo pipefail\n{commands(PAGE.read_text())}"
    options = {"cwd": ROOT, "env": cloud.environment, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", script], check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(cloud.folder.glob("*.queue"))
    started = [path.read_text().split("\0train\0") for path in cloud.folder.glob("*/trained")]
    assert len(started) >= 2
    for text in {text for texts in started for text in texts}:
        check_train(["train", *text.removeprefix("train\0").strip("\0").split("\0")])
    for call in cloud.calls():
        check_call(*call)


def check_call(name: str, *words: str) -> None:
    """Checks what a stand-in was called with."""
    if name == "nalora":
        parse(words)
    elif name == "sbatch":
        place = words.index("deploy/slurm.sbatch")
        assert set(words[:place:2]) <= {"--nodes", "--ntasks-per-node", "--gpus-per-node"}
        check_train(["train", "--resume", "auto", *words[place + 1 :]])
    elif name == "docker" and words[0] == "run":
        check_train(list(words[words.index("train") :]))
    elif name == "kubectl" and words[0] == "logs":
        resource = yaml.safe_load((ROOT / "deploy" / "jobset.yaml").read_text())
        labels = dict(label.split("=") for label in words[-1].split(","))
        assert labels.pop("jobset.sigs.k8s.io/jobset-name") == resource["metadata"]["name"]
        assert labels == {"batch.kubernetes.io/job-completion-index": "0"}


def test_the_commands_of_the_readme_are_those_of_the_page() -> None:
    section = (ROOT / "README.md").read_text().split("## Pods and GPUs\n")[1].split("\n## ")[0]
    assert set(one_by_one(section)) <= set(one_by_one(PAGE.read_text()))


def test_the_table_of_types_has_topologies_that_plan_knows_and_prices_by_chip() -> None:
    row = r"^\| `(\S+)` \| (\d+) (\w+) \| (\d+) \| `(\S+)` \| ([\d.]+) \|$"
    rows = re.findall(row, PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 8
    for name, chips, kind, hosts, shape, price in rows:
        assert topology(shape).size == int(chips), name
        assert shape.startswith(f"{kind}:")
        assert float(price) == pytest.approx(
            int(chips) * {"v5e": 1.2, "v6e": 2.7, "v5p": 4.2}[kind]
        )
        assert int(chips) / int(hosts) in (4, 8)
