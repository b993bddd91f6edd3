"""A run's output folder: its lock, its checks, its visibility to all processes, its copy in a
store.

<output>/run.lock         the process that writes here, during a run
        /metrics.jsonl    metrics and settings (`nalora_jax.evaluate.run_log`)
        /checkpoints/     checkpoints to resume from (`nalora_jax.train.checkpoint`)
        /before.json      held-out metrics of the base model
        /start/           LoRA-GA's adapters before the first step (`nalora_jax.assembly.start`)
        /profile/         a trace of some steps, if requested (`nalora_jax.train.profile`)
        /adapter/         PEFT files of the best checkpoint
        /report.html      generated from metrics.jsonl

In an object store (``gs://bucket/run``, ``s3://bucket/run``), the first process writes to a local
folder. Its finished files are copied to the store every 30 seconds and once more at the end; files
that the run removed are removed from the store. A resumed run, on the same or another machine,
first fetches the files of the store. Other processes fetch them too, but write no files.

In Google's store, all processes write checkpoints directly, through Orbax, and a commit file
completes each; they are never copied. In other stores, one process copies its checkpoints like the
other files. The digests are copied first, so that an incomplete copy is detected as damaged, and
the previous checkpoint is restored. The log reaches every store before the checkpoints whose steps
it contains, so that the log of a resumed run is complete.

Paths are etils' `epath`, which supports ``gs://`` and ``s3://`` through fsspec's packages.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import path as ocp_path

from nalora_jax.common import buckets, downloads, files
from nalora_jax.common.digests import DIGESTS, digest_of
from nalora_jax.common.files import refuse_linked_folders
from nalora_jax.common.folders import START
from nalora_jax.common.locks import RUN_LOCK, RunLock
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.run_log import ROLLOUTS
from nalora_jax.mesh.processes import run_on_first_process
from nalora_jax.train.profile import FOLDER as PROFILE

CHECKPOINTS = "checkpoints"
# Entries that a run may write before its first checkpoint.
_BEGINNING = {
    "metrics.jsonl",
    "before.json",
    "tensorboard",
    "wandb",
    "mlflow",
    START,
    CHECKPOINTS,
    PROFILE,
}
_BEGINNING |= {ROLLOUTS, "rollouts"}  # with rewards
_BEGINNING |= {"proofs.jsonl", "served"}  # with servers for rollouts
# Samples of servers (`nalora_jax.kinds.rl.servers.received`), which cannot be repeated, stay if
# a run starts again before its first checkpoint.
_RECEIVED = "received"
_BEGINNING.add(_RECEIVED)
# Seconds in which a file has to appear on all hosts; NFS keeps listings for some seconds.
_SEEN_WITHIN = 20.0

Resume = bool | Literal["auto"]


@dataclass(frozen=True)
class Output:
    """A run's locked folder, and whether it contains a run to resume."""

    folder: Path
    resumes: bool
    mirror: Mirror | None = None  # copies the folder to a URL

    @property
    def common(self) -> Any:
        """Returns the folder that every process may write to; an ``epath.Path`` in a bucket."""
        if self.mirror is not None and CHECKPOINTS in self.mirror.without:
            return self.mirror.store
        return self.folder

    @property
    def checkpoints(self) -> Any:
        """Returns the folder of checkpoints, in `common`."""
        return self.common / CHECKPOINTS

    def copy_log(self) -> None:
        """Copies the log to the store, before a checkpoint of its last step is written there."""
        mirror = self.mirror
        if mirror is None or CHECKPOINTS not in mirror.without:
            return  # there, a copy of the folder brings log and checkpoints in this order
        if jax.process_index() == 0:
            mirror.try_to_push()

    def share(self, name: str) -> None:
        """Makes folder ``name`` of the first process readable in all processes; all call it."""
        if self.mirror is not None and jax.process_count() > 1:
            run_on_first_process(self.mirror.push)
            if jax.process_index():
                self.mirror.fetch(name)


@contextmanager
def open_output(folder: Path | str, resume: Resume) -> Iterator[Output]:
    """Creates or checks a run's output folder, so that no two runs write to the same one.

    With several processes, the first one decides for all, before any of them writes, and holds the
    lock.

    Args:
      folder: a folder on storage that all processes share, or a URL; several processes need
        ``gs://``.
      resume: resume the run in the folder. "auto" resumes if there is a checkpoint, and otherwise
        starts a new run, replacing the log of a run that stopped before its first checkpoint.

    Raises:
      NaloraError: the folder contains files and ``resume`` is off; ``resume`` is on and there is no
        checkpoint; another process writes to it; it cannot be written; a process does not see it;
        or a folder in it is a symbolic link.
    """
    where = buckets.url(str(folder))
    several = jax.process_count() > 1
    if where is None:
        with _claimed(Output(Path(folder), False), resume) as output:
            if several:
                check_shared(Path(folder))
            yield output
        return
    direct = where.startswith(_DIRECT)
    if several and not direct:
        remedy = "mount the bucket on every host (mountpoint-s3 for s3://) and name a folder in it"
        expected = f"a folder of a file system or gs://..., with {jax.process_count()} processes"
        raise NaloraError("--output", expected=expected, found=where, remedy=remedy)
    with mirror_folder(
        where, fresh=not resume, without=(CHECKPOINTS,) if direct else ()
    ) as mirror:
        if several:
            check_shared(mirror.store)
        if jax.process_index():
            mirror.fetch()
        with _claimed(Output(mirror.folder, False, mirror), resume) as output:
            yield output


@contextmanager
def _claimed(output: Output, resume: Resume) -> Iterator[Output]:
    """Locks a local folder within the block; yields ``output`` with ``resumes`` set.

    The first process decides for all.
    """
    held: list[RunLock] = []
    try:
        resumes = run_on_first_process(
            lambda: _claim(output.folder, output.checkpoints, resume, held)
        )
        if jax.process_count() > 1:
            resumes = multihost_utils.broadcast_one_to_all(np.int32(bool(resumes)))
        yield replace(output, resumes=bool(resumes))
    finally:
        for lock in held:
            lock.release()


def check_shared(folder: Any) -> None:
    """Raises an error unless all processes see a file that the first one writes to a folder.

    Args:
      folder: a `Path`, or an ``epath.Path`` in a bucket.

    Raises:
      NaloraError: in every process, naming the processes that do not see the folder.
    """
    # A random name, the same in all processes, that no earlier run has left behind.
    number = multihost_utils.broadcast_one_to_all(
        np.frombuffer(secrets.token_bytes(8), np.uint32)
    )
    mark = folder / f".shared-{number.tobytes().hex()}"
    run_on_first_process(mark.touch)
    until = time.monotonic() + _SEEN_WITHIN
    # Network file systems show a new file only after a while.
    while not (visible := _is_seen(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    visible_to = np.asarray(
        multihost_utils.process_allgather(np.int32(visible))
    ).ravel()
    run_on_first_process(lambda: mark.unlink(missing_ok=True))
    if not visible_to.all():
        blind = ", ".join(map(str, np.flatnonzero(visible_to == 0)[:8]))
        raise NaloraError(
            f"--output {folder}",
            expected=f"a folder that all {len(visible_to)} processes share",
            found=f"one that process {blind} does not see",
            remedy="name a folder on storage that is mounted on every host (NFS, Filestore), or a "
            "bucket (gs://...) that every host may read and write",
        )


def _is_seen(mark: Any) -> bool:
    """Returns True if this process sees the file ``mark``."""
    try:
        return bool(mark.exists())
    except Exception:
        # e.g. missing permissions; the other processes have to be notified
        return False


def _claim(path: Path, checkpoints: Any, resume: Resume, held: list[RunLock]) -> bool:
    """Creates or checks the folder and locks it; returns True if there is a run to resume.

    Only the first process calls it. With "auto" it removes the remains of a run that stopped before
    its first checkpoint.

    Args:
      path: the run's local folder.
      checkpoints: its folder of checkpoints, which may be in a bucket.
      resume: see `open_output`.
      held: gets the lock, so that the caller releases it even after an error.

    Raises:
      NaloraError: see `open_output`.
    """
    if path.exists() and not path.is_dir():
        raise NaloraError(
            "--output",
            expected="a folder",
            found=f"the file {path}",
            remedy="choose another name",
        )
    if resume is True:
        _require_checkpoint(path, checkpoints)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(path / RUN_LOCK)
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
    # Only known entries are removed; any other file in the folder is an error below.
    if resume == "auto" and not resumes and set(_files(path)) <= _BEGINNING:
        # Of a run that stopped before its first checkpoint.
        for name in set(_files(path)) - {_RECEIVED}:
            entry = path / name
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        if checkpoints.exists():  # in a bucket
            epath.Path(checkpoints).rmtree()
    left = _files(path)
    if resume == "auto" and left == [_RECEIVED]:
        left = []
    if not resumes and left:
        way = ""
        if has_checkpoint(checkpoints):
            way = ", or continue that run with --resume"
        raise NaloraError(
            "--output",
            expected="a new or empty folder",
            found=f"{path}, which holds {list_first_names(left)}",
            remedy=f"choose another folder{way}",
        )
    return resumes


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
    """Raises an error if there is no checkpoint to resume, with a remedy by the folder's content.

    Args:
      path: the run's local folder.
      checkpoints: its folder of checkpoints, which may be in a bucket.
    """
    if has_checkpoint(checkpoints):
        return
    remedy = "start without --resume, or name the run's own --output"
    if (path / "adapter_config.json").exists():
        remedy = (
            f"the folder is an adapter, not a run: continue it with --adapter {path} and a new "
            "--output"
        )
    elif _files(path) and set(_files(path)) <= _BEGINNING:
        remedy = (
            "the run in it stopped before its first checkpoint: delete the folder, or start in "
            "another one"
        )
    raise NaloraError(
        "--resume",
        expected=f"a checkpoint in {checkpoints}",
        found="none",
        remedy=remedy,
    )


def _files(path: Path) -> list[str]:
    """Returns the names of a run's files in ``path``, without the lock."""
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in path.iterdir() if entry.name != RUN_LOCK)


log = logging.getLogger(__name__)
# In the store: the machine that copies to it, and the time of its last copy.
HOLDER = "lock"
_EVERY = 30.0  # seconds between two copies
_DIRECT = "gs://"  # Orbax and TensorStore write such checkpoints without a local copy


def list_first_names(names: Sequence[str]) -> str:
    """Returns the first names of a folder's files, for messages."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def write_text(folder: str, name: str, text: str) -> None:
    """Writes a file of ``folder``, a path or a URL, in one step.

    Raises:
      NaloraError: the folder cannot be written.
    """
    where = buckets.url(folder)
    if where is None:
        files.write_atomically(Path(folder) / name, text)
        return
    with _store_errors(where, "a folder that can be written"):
        (store_folder(where) / name).write_text(text)


@contextmanager
def mirror_folder(
    where: str, *, fresh: bool, without: tuple[str, ...] = ()
) -> Iterator[Mirror]:
    """Opens a local folder whose finished files are copied to the URL ``where``.

    Copying stops when the context ends. With several processes, each has a local folder. Only the
    first one's is copied; the others are empty until `Mirror.fetch`.

    Args:
      where: the run's folder in the store.
      fresh: require an empty folder in the store; otherwise its files are fetched first.
      without: names of top-level folders that are neither fetched nor copied.

    Raises:
      NaloraError: the store cannot be reached or written; another machine writes to that folder; or
        ``fresh`` and the folder contains a run. At the end: the last copy failed; the message names
        the local folder, which still contains all files.
    """
    name = digest_of(where)[:16]
    if jax.process_index():  # several processes may share a machine
        name += f"-{jax.process_index()}"
    folder = downloads.cache_dir() / "runs" / name
    mirror = Mirror(where, store_folder(where), folder, without)

    def begin() -> None:
        """Checks and claims the folder in the store, and copies it here; on the first process."""
        with _store_errors(where, "a folder that can be read and written"):
            if fresh and (names := sorted(mirror.names())):
                raise NaloraError(
                    "--output",
                    expected="a new or empty folder",
                    found=f"{where}, which holds {list_first_names(names)}",
                    remedy="choose another folder, or continue that run with --resume",
                )
            mirror.claim()
            mirror.fetch()
            mirror.push()

    run_on_first_process(begin)
    if jax.process_index():
        yield mirror
        return
    stop = threading.Event()
    thread = threading.Thread(
        target=_keep_copying, args=(mirror, stop), name="output copies", daemon=True
    )
    thread.start()
    try:
        yield mirror
    finally:
        stop.set()
        thread.join()
        with _store_errors(
            where, f"to take the last files of the run, which are in {folder}"
        ):
            mirror.push()
            (mirror.store / HOLDER).unlink(missing_ok=True)
        log.info("output: %s", where)


@dataclass
class Mirror:
    """Copy of one local folder in one folder of a store."""

    where: str
    store: epath.Path
    folder: Path
    # Folders at its top that are neither fetched nor copied.
    without: tuple[str, ...] = ()
    # Size and time of each file at its last copy.
    _copied: dict[str, tuple[int, int]] = field(default_factory=dict)
    _copies: threading.Lock = field(default_factory=threading.Lock)
    _failed: bool = False  # True if the last copy failed

    def claim(self) -> None:
        """Records in the store that this machine writes there.

        Raises:
          NaloraError: another machine writes there.
        """
        lock = self.store / HOLDER
        if lock.exists():
            try:
                holder = json.loads(lock.read_text())
                age = time.time() - float(holder["time"])
            except (ValueError, KeyError, TypeError, RecursionError):
                holder = {}
                age = 0.0
            # A claim is renewed at every copy; after four missed ones its machine is taken for
            # gone.
            longest = 4 * _EVERY
            if holder.get("host") != socket.gethostname() and age < longest:
                host = holder.get("host", "another machine")
                raise NaloraError(
                    f"--output {self.where}",
                    expected="a folder that no other run writes to",
                    found=f"that {host} wrote to it {age:.0f} seconds ago",
                    remedy="wait for that run or stop it; if it is gone, start again in "
                    f"{longest:.0f} seconds",
                )
        self._sign()

    def fetch(self, within: str = "") -> None:
        """Replaces the local folder, or a folder ``within`` it, by its copy in the store."""
        here = self.folder / within
        # of an earlier run on this machine; the store has its last copies
        if here.exists():
            shutil.rmtree(here)
        here.mkdir(parents=True, exist_ok=True)
        for name in self.names():
            # With `within` empty, each name starts with the prefix.
            if name.partition("/")[0] in self.without or not name.startswith(
                within and f"{within}/"
            ):
                continue
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.store / name).copy(target, overwrite=True)
            self._copied[name] = _state(target)

    def push(self) -> None:
        """Copies new and changed files to the store in `_order_of_copies`, and removes deleted
        ones.

        It also renews this machine's claim.
        """
        with self._copies:
            self._sign()
            # A file that changes during its copy gets its earlier state here, and is copied again.
            states = {
                name: _state(self.folder / name)
                for name in list_finished_files(self.folder)
            }
            for name in sorted(states, key=_order_of_copies):
                if self._copied.get(name) != states[name]:
                    epath.Path(self.folder / name).copy(
                        self.store / name, overwrite=True
                    )
                    self._copied[name] = states[name]
            for name in self._copied.keys() - states.keys():
                (self.store / name).unlink(missing_ok=True)
                del self._copied[name]

    def try_to_push(self) -> None:
        """Copies like `push`; warns if the store cannot be written, once until it can again."""
        try:
            self.push()
            self._failed = False
        except FileNotFoundError:  # the run removed a file during the copy
            return
        except Exception as error:
            # Stores raise any type; the last copy of a run does not suppress it.
            if not self._failed:
                log.warning(
                    "%s cannot be written (%s); trying again", self.where, error
                )
            self._failed = True

    def names(self) -> list[str]:
        """Returns the names of the run's files in the store."""
        if not self.store.exists():
            return []
        names = files.names_below(self.store)
        return [name for name in names if name != HOLDER and not name.startswith(".")]

    def _sign(self) -> None:
        """Writes this machine's name and the time to the store, which keeps the claim valid."""
        (self.store / HOLDER).write_text(
            json.dumps({"host": socket.gethostname(), "time": time.time()})
        )


def list_finished_files(folder: Path) -> list[str]:
    """Returns the files below ``folder`` except scratch files and uncommitted checkpoints."""
    # Changing `folders` in place keeps `os.walk` out of uncommitted checkpoints.
    names_found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if ocp_path.atomicity_types.TMP_DIR_SUFFIX not in name
        ]
        within = Path(root).relative_to(folder)
        names_found += [
            str(within / name)
            for name in names
            if not name.startswith(".") and name != RUN_LOCK
        ]
    return names_found


def _keep_copying(mirror: Mirror, stop: threading.Event) -> None:
    """Copies at intervals until ``stop`` is set; the body of a thread."""
    while not stop.wait(_EVERY):
        mirror.try_to_push()


def _order_of_copies(name: str) -> tuple[bool, bool, str]:
    """Returns the sort key of a file: digests, which list the files that have to follow, then the
    log and other files, then the checkpoints of steps in that log."""
    is_digest = Path(name).name == DIGESTS
    return not is_digest, name.startswith(f"{CHECKPOINTS}/"), name


def store_folder(where: str) -> epath.Path:
    """Returns the folder in the store.

    Raises:
      NaloraError: the store's package is missing, or the store cannot be read.
    """
    with _store_errors(where, "a folder that can be read"):
        try:
            if where.startswith(_DIRECT):
                from fsspec.config import conf

                # gcsfs would not list files of other processes from its cache.
                conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
            store = epath.Path(where)
            store.exists()  # Fails here if the store cannot be reached; the result is unused.
        except (ImportError, ValueError, KeyError) as error:
            raise buckets.missing_package("--output", where) from error
    return store


def _state(path: Path) -> tuple[int, int]:
    """Returns size and modification time, which change with a file's content."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def _store_errors(where: str, expected: str) -> Iterator[None]:
    """Converts all errors of a store to this library's error."""
    try:
        yield
    except NaloraError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        remedy = "check the bucket and your rights"
        raise NaloraError(
            f"--output {where}", expected=expected, found=reason, remedy=remedy
        ) from error
