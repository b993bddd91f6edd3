"""A run's output folder: its lock, its checks, and its visibility to all processes.

<output>/run.lock         the process that writes here, during a run
        /metrics.jsonl    metrics and settings (`nalora_jax.train.metrics`)
        /checkpoints/     checkpoints to resume from (`nalora_jax.train.checkpoint`)
        /before.json      held-out metrics of the base model
        /start/           LoRA-GA's adapters before the first step (`nalora_jax.train.start`)
        /profile/         a trace of some steps, if requested (`nalora_jax.train.profile`)
        /adapter/         PEFT files of the best checkpoint
        /report.html      generated from metrics.jsonl

In a bucket (``gs://...``), all processes write the checkpoints directly; all other files are
written to a local folder of the first process and copied (`nalora_jax.train.remote`).
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import path as ocp_path

from nalora_jax.common import buckets, files
from nalora_jax.common.paths import refuse_linked_folders
from nalora_jax.errors import NaloraError
from nalora_jax.layout.distributed import on_first_process
from nalora_jax.train import remote
from nalora_jax.train.lock import FILE as LOCK
from nalora_jax.train.lock import Lock
from nalora_jax.train.profile import FOLDER as PROFILE

CHECKPOINTS = "checkpoints"
START = "start"
# Entries that a run may write before its first checkpoint.
_BEGINNING = {"metrics.jsonl", "before.json", "tensorboard", "wandb", "mlflow", START, CHECKPOINTS, PROFILE}
_SEEN_WITHIN = (
    20.0  # seconds in which a file has to appear on all hosts; NFS keeps listings for some seconds
)

Resume = bool | Literal["auto"]


@dataclass(frozen=True)
class Output:
    """A run's locked folder, and whether it contains a run to resume."""

    folder: Path
    resumes: bool
    mirror: remote.Mirror | None = None  # copies the folder to a URL

    @property
    def checkpoints(self) -> Any:
        """Returns the folder of checkpoints: a `Path`, or an ``epath.Path`` in a bucket."""
        return _checkpoints(self.folder, self.mirror)

    @property
    def common(self) -> Any:
        """Returns the folder that every process may write to; an ``epath.Path`` in a bucket."""
        return self.checkpoints.parent

    def share(self, name: str) -> None:
        """Makes folder ``name`` of the first process readable in all processes; all call it."""
        if self.mirror is not None and jax.process_count() > 1:
            on_first_process(self.mirror.push)
            if jax.process_index():
                self.mirror.fetch(name)


@contextmanager
def open_output(folder: Path | str, resume: Resume) -> Iterator[Output]:
    """Creates or checks a run's output folder, so that no two runs write to the same one.

    With several processes, the first one decides for all, before any of them writes, and holds the
    lock.

    Args:
      folder: a folder on storage that all processes share, or a URL (`nalora_jax.train.remote`);
        several processes need ``gs://``.
      resume: resume the run in the folder. "auto" resumes if there is a checkpoint, and otherwise
        starts a new run, replacing the log of a run that stopped before its first checkpoint.

    Raises:
      NaloraError: the folder contains files and ``resume`` is off; ``resume`` is on and there is no
        checkpoint; another process writes to it; it cannot be written; a process does not see it;
        or a folder in it is a symbolic link.
    """
    where = buckets.url(str(folder))
    if where is None:
        with _claimed(Path(folder), resume, None) as output:
            if jax.process_count() > 1:
                check_shared(Path(folder))
            yield output
        return
    _refuse_url(where)
    excluded = (CHECKPOINTS,) if remote.is_written_directly(where) else ()
    with remote.mirrored(where, fresh=not resume, without=excluded) as mirror:
        if jax.process_count() > 1:
            check_shared(mirror.store)
        if jax.process_index():
            mirror.fetch()
        with _claimed(mirror.folder, resume, mirror) as output:
            yield output


@contextmanager
def _claimed(path: Path, resume: Resume, mirror: remote.Mirror | None) -> Iterator[Output]:
    """Opens a local folder for `open_output`, with the mirror that copies it to a URL."""
    held: list[Lock] = []
    try:
        resumes = on_first_process(lambda: _claim(path, _checkpoints(path, mirror), resume, held))
        if jax.process_count() > 1:
            resumes = bool(multihost_utils.broadcast_one_to_all(np.int32(bool(resumes))))
        yield Output(path, bool(resumes), mirror)
    finally:
        for lock in held:
            lock.release()


def _checkpoints(folder: Path, mirror: remote.Mirror | None) -> Any:
    if mirror is not None and CHECKPOINTS in mirror.without:
        return mirror.store / CHECKPOINTS
    return folder / CHECKPOINTS


def check_shared(folder: Any, within: float = _SEEN_WITHIN) -> None:
    """Raises an error unless all processes see a file that the first one writes to a folder.

    Args:
      folder: a `Path`, or an ``epath.Path`` in a bucket.
      within: seconds that the file may take to appear.

    Raises:
      NaloraError: in every process, naming the processes that do not see the folder.
    """
    number = multihost_utils.broadcast_one_to_all(np.frombuffer(secrets.token_bytes(8), np.uint32))
    mark = folder / f".shared-{number.tobytes().hex()}"
    on_first_process(mark.touch)
    until = time.monotonic() + within
    while not (visible := _is_seen(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    visible_to = np.asarray(multihost_utils.process_allgather(np.int32(visible))).ravel()
    on_first_process(lambda: mark.unlink(missing_ok=True))
    if not visible_to.all():
        blind = ", ".join(map(str, np.flatnonzero(visible_to == 0)[:8]))
        raise NaloraError(
            f"--output {folder}",
            expected=f"a folder that all {len(visible_to)} processes share",
            found=f"one that process {blind} does not see",
            remedy="name a folder on storage that is mounted on every host (NFS, Filestore), or a bucket (gs://...) "
            "that every host may read and write",
        )


def _is_seen(mark: Any) -> bool:
    try:
        return bool(mark.exists())
    except Exception:  # e.g. missing permissions; the other processes have to be notified
        return False


def _refuse_url(where: str) -> None:
    """Raises an error for URLs that several processes cannot write checkpoints to."""
    if jax.process_count() > 1 and not remote.is_written_directly(where):
        remedy = "mount the bucket on every host (mountpoint-s3 for s3://) and name a folder in it"
        expected = f"a folder of a file system or gs://..., with {jax.process_count()} processes"
        raise NaloraError("--output", expected=expected, found=where, remedy=remedy)


def _claim(path: Path, checkpoints: Any, resume: Resume, held: list[Lock]) -> bool:
    """Creates or checks the folder and locks it; returns True if there is a run to resume."""
    if path.exists() and not path.is_dir():
        raise NaloraError(
            "--output", expected="a folder", found=f"the file {path}", remedy="choose another name"
        )
    if resume is True:
        _require_checkpoint(path, checkpoints)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = Lock.acquire(path / LOCK)
    except OSError as error:
        reason = error.strerror or error
        raise NaloraError(
            f"--output {path}", expected="a folder that can be written", found=reason
        ) from error
    held.append(lock)
    resumes = bool(resume) and has_checkpoint(checkpoints)
    if resume is True:
        # Again: another process may have removed it while it held the lock.
        _require_checkpoint(path, checkpoints)
    if resumes:
        refuse_linked_folders(path)
        refuse_linked_folders(path / CHECKPOINTS)
    if resume == "auto" and not resumes and set(_files(path)) <= _BEGINNING:
        _clear(path)
        if checkpoints.exists():  # in a bucket
            files.remove_tree(checkpoints)
    if not resumes and _files(path):
        way = ""
        if has_checkpoint(checkpoints):
            way = ", or continue that run with --resume"
        raise NaloraError(
            "--output",
            expected="a new or empty folder",
            found=f"{path}, which holds {remote.listing(_files(path))}",
            remedy=f"choose another folder{way}",
        )
    return resumes


def _clear(path: Path) -> None:
    """Removes the files of a run that stopped before its first checkpoint."""
    for name in _files(path):
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def has_checkpoint(checkpoints: Any) -> bool:
    """Returns True if a run's folder of checkpoints contains a committed one."""
    return last_step(checkpoints) is not None


def last_step(checkpoints: Any) -> int | None:
    """Returns the step of the newest committed checkpoint in a folder; None without any."""
    if not checkpoints.is_dir():
        return None
    steps = ocp_path.step.standard_name_format().find_all(checkpoints)
    return max((step.step for step in steps), default=None)


def _require_checkpoint(path: Path, checkpoints: Any) -> None:
    if has_checkpoint(checkpoints):
        return
    remedy = "start without --resume, or name the run's own --output"
    if (path / "adapter_config.json").exists():
        remedy = (
            f"the folder is an adapter, not a run: continue it with --adapter {path} and a new --output"
        )
    elif _files(path) and set(_files(path)) <= _BEGINNING:
        remedy = (
            "the run in it stopped before its first checkpoint: delete the folder, or start in another one"
        )
    raise NaloraError("--resume", expected=f"a checkpoint in {checkpoints}", found="none", remedy=remedy)


def _files(path: Path) -> list[str]:
    """Returns the names of a run's files in ``path``, without the lock."""
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in path.iterdir() if entry.name != LOCK)
