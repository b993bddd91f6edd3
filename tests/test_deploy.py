"""Statements in the files of deploy/ and the containers; tests/deploy executes the launchers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


# Runs the tasks of a step one after another; returns the highest status, as srun does.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >>"$HOME/options"; shift; done
highest=0
for STATUS in $STATUSES; do
  export STATUS
  "$@"
  status=$?
  ((status <= highest)) || highest=$status
done
exit $highest
"""


def submitted(script: str, home: Path, statuses: str, restarts: int) -> tuple[int, str]:
    """Runs a job whose tasks end with ``statuses``; returns its status, and the job that was requeued."""
    commands = {"scontrol": '#!/bin/bash\necho "$*" >"$HOME/requeued"\n', "srun": SRUN}
    for name, text in (commands | {"bin/nalora": "#!/bin/bash\nexit $STATUS\n"}).items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text)
        (home / name).chmod(0o755)
    environment = {"PATH": f"{home}:{os.environ['PATH']}", "HOME": str(home), "NALORA_ENV": str(home)}
    environment |= {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1"}
    environment |= {"SLURM_CPUS_PER_TASK": "8", "SLURM_RESTART_COUNT": str(restarts), "STATUSES": statuses}
    done = subprocess.run(["bash", DEPLOY / script, "x"], env=environment, check=False)
    assert "--cpus-per-task=8" in (home / "options").read_text().split()
    requeued = home / "requeued"
    return done.returncode, requeued.read_text().strip() if requeued.exists() else ""


@pytest.mark.parametrize(
    ("statuses", "restarts", "status", "requeued"),
    [
        ("0 0", 0, 0, False),
        ("2 2", 0, 255, False),
        ("1 75 134", 0, 255, False),  # a task crashed, and the others noticed
        ("75 134 75", 0, 134, True),
        ("143 143", 19, 143, True),
        ("143 143", 20, 143, False),
    ],
)
def test_slurm_requeues_interrupted_jobs_only(
    tmp_path: Path, statuses: str, restarts: int, status: int, requeued: bool
) -> None:
    expected = (status, "requeue 9" if requeued else "")
    assert submitted("slurm.sbatch", tmp_path, statuses, restarts) == expected


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(2, 0, False), (143, 19, True), (143, 20, False)]
)
def test_slurm_requeues_the_interrupted_task_of_a_study(
    tmp_path: Path, status: int, restarts: int, requeued: bool
) -> None:
    expected = (status, "requeue 9_1" if requeued else "")
    assert submitted("study.sbatch", tmp_path, str(status), restarts) == expected


def instructions(kind: str) -> list[list[str]]:
    """Returns the words of each line of a Dockerfile."""
    text = (DEPLOY / f"Dockerfile.{kind}").read_text()
    return [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("kind", ["tpu", "cuda"])
def test_the_install_line_of_a_container_is_executed_on_the_files_that_it_copies(
    kind: str, tmp_path: Path
) -> None:
    """``pip`` and others are stand-ins that keep their arguments; the folder has only what the COPY lines bring."""
    context, tools = tmp_path / "opt", tmp_path / "tools"
    for folder in (context, tools):
        folder.mkdir()
    for program in ("pip", "apt-get", "git"):
        (tools / program).write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > "$ARGUMENTS.{program}"\n')
        (tools / program).chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "ARGUMENTS": str(tmp_path / "arguments")}
    for name, rest in instructions(kind):
        if name == "COPY":
            *sources, target = rest.split()
            copy(sources, context / target)
        elif name == "ARG":
            variable, _, value = rest.partition("=")
            environment[variable] = value
        elif name == "RUN":
            subprocess.run(["sh", "-c", rest], cwd=context, env=environment, check=True)
    install, no_cache, pinned, package = (tmp_path / "arguments.pip").read_text().splitlines()
    assert (install, no_cache) == ("install", "--no-cache-dir")
    extra = re.fullmatch(r"jax\[(\w+)\]==0\.10\.2", pinned)
    package_extras = re.fullmatch(r"\.\[(\w+),gcs,datasets\]", package)
    assert extra
    assert package_extras
    project = tomllib.loads((context / "pyproject.toml").read_text())["project"]
    assert any(
        line.startswith(f"jax[{extra[1]}]") for line in project["optional-dependencies"][package_extras[1]]
    )
    assert {"gcs", "datasets"} <= set(project["optional-dependencies"])
    assert "git" in (tmp_path / "arguments.apt-get").read_text().split()
    for name in (project["readme"], *project["license-files"], "nalora_jax/__main__.py"):
        assert (context / name).exists(), name


def copy(sources: list[str], target: Path) -> None:
    """Copies as a Dockerfile's COPY does: files into a folder, the content of a folder into a folder."""
    for source in sources:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, target)
