"""Executes deploy/tpu_pod.sh in a clean Ubuntu 22.04, the system of the TPU VM image, with packages from the index.

    python -m tests.deploy.clean_root --root /var/tmp/jammy

Needs debootstrap, bubblewrap, root's rights and some 8 GB. The root file system is made once (two minutes), with what
the image has: Python 3.10 with pip, curl, git, sudo. Two workers install uv, Python 3.11 and this package with its
extras for TPUs, train the tiny model on their CPUs over loopback, are preempted by SIGTERM, and complete the run on the
second start.

``--python-of-ubuntu`` installs Ubuntu's package python3.11 first, for a network without GitHub, from which uv downloads
Pythons. That download is then not tested.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests.deploy import sandbox
from tests.deploy.conftest import ZONE, Cloud
from tests.deploy.test_resume import flags, last_step, logs, preempted_on_a_slice, runs

PACKAGES = "python3,python3-pip,ca-certificates,curl,git,sudo,procps"
ABSENT = ("gcsfuse", "uv", "gcc")


def make_root(folder: Path, mirror: str, *, python: bool) -> None:
    """Bootstraps the root file system into ``folder``, unless it is there."""
    if not (folder / "usr" / "bin" / "python3").exists():
        command = [
            "debootstrap",
            "--variant=minbase",
            "--components=main,universe",
            f"--include={PACKAGES}",
        ]
        subprocess.run([*command, "jammy", str(folder), mirror], check=True)
    for place in (sandbox.HOME, sandbox.SHARED):
        (folder / place[1:]).mkdir(parents=True, exist_ok=True)
    shutil.copy("/etc/resolv.conf", folder / "etc" / "resolv.conf")
    hosts = f"127.0.0.1 localhost {socket.gethostname()}\n"  # debootstrap writes none; Gloo looks its own name up
    (folder / "etc" / "hosts").write_text(hosts)
    if python:
        updates = folder / "etc" / "apt" / "sources.list.d" / "updates.list"
        updates.write_text(f"deb {mirror} jammy-updates main universe\n")
        for words in (("update",), ("install", "--yes", "--no-install-recommends", "python3.11")):
            subprocess.run(["chroot", folder, "apt-get", "--quiet=2", *words], check=True)
    for name in (*ABSENT, *(() if python else ("python3.11",))):
        assert subprocess.run(
            ["chroot", folder, "which", name], capture_output=True, check=False
        ).returncode, name


def variables() -> dict[str, str]:
    """Returns the environment of a worker in the root, besides that of tests/deploy/conftest.py."""
    bundle = "/etc/ssl/certs/ca-certificates.crt"
    folders = {"NALORA_CACHE": f"{sandbox.SHARED}/cache", "UV_CACHE_DIR": f"{sandbox.SHARED}/uv"}
    return folders | {"SSL_CERT_FILE": bundle, "PIP_CERT": bundle}


def main() -> None:
    """Makes the root, and a run in it that is preempted and completed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--mirror", default="http://archive.ubuntu.com/ubuntu")
    parser.add_argument("--python-of-ubuntu", action="store_true")
    args = parser.parse_args()
    make_root(args.root, args.mirror, python=args.python_of_ubuntu)
    with tempfile.TemporaryDirectory(dir=args.root.parent) as folder:
        cloud = Cloud(Path(folder), root=args.root)
        for worker in cloud.settings["workers"].values():
            worker.pop("DEPLOY_RECORD")
            worker |= variables()
        cloud.save()
        try:
            train(cloud)
        except AssertionError:
            print(logs(cloud))
            raise


def train(cloud: Cloud) -> None:
    """Starts a run, preempts it, and completes it."""
    run = cloud.shared / "run"
    words = [word.replace(str(cloud.shared), sandbox.SHARED) for word in flags(cloud.shared)]
    began = time.monotonic()
    cloud.pod("create", "pod", *ZONE, "--type", "v6e-8")
    preempted_on_a_slice(cloud, run, [*words, "--steps", "100000"])
    print(
        f"preempted after step {last_step(run)}, {time.monotonic() - began:.0f} s after the start",
        flush=True,
    )
    before = last_step(run)
    started = cloud.pod("start", "pod", *ZONE, "--", *words, "--steps", str(before + 3))
    assert started.returncode == 0, started.stderr
    while runs(cloud.pids()):
        time.sleep(0.5)
    status = cloud.pod("status", "pod", *ZONE).stdout
    assert status.count(": ended, status 0: done") == 2, status + logs(cloud)
    assert f"resumed from step {before}" in logs(cloud)
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    print(f"completed at step {last_step(run)}, {time.monotonic() - began:.0f} s after the start")
    for worker in ("pod-0", "pod-1"):
        packages = [
            sandbox.HOME + "/nalora-env/bin/python",
            "-c",
            "import sys, gcsfs, datasets, libtpu; print(sys.version)",
        ]
        machine = sandbox.Machine(
            cloud.home(worker),
            cloud.shared,
            cloud.folder,
            cloud.settings["workers"][worker],
            Path(cloud.settings["root"]),
        )
        print(
            worker,
            subprocess.run(
                machine.command(packages), capture_output=True, text=True, check=True
            ).stdout.strip(),
        )


if __name__ == "__main__":
    main()
