"""Checkpoints of a run: what training changes, where the data stands, and what it all belongs to.

Orbax writes them in the background and commits each by a rename, so a checkpoint is whole or absent. The frozen base
weights are never in one; in their place stand the base model's fingerprint and the run's settings, and restoring into
another model or other settings is an error that names what differs.

    <output>/checkpoints/<step>/state    arrays: step, adapters, optimizer, gate averages, random key data
                               /data     position of the input pipeline
                               /run      fingerprint of the base model, and the settings
                               /metrics  held-out metrics, where they were measured at that step
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from nalora_jax import trees
from nalora_jax.distributed import on_first_process
from nalora_jax.errors import NaloraError
from nalora_jax.train import snapshot

FOLDER = "checkpoints"  # inside a run's output folder


class Checkpointer:
    """Saves and restores one run's checkpoints in one folder.

    Args:
      folder: where they live; created if missing. Left-overs of an interrupted save are removed.
      fingerprint: of the base model that the adapters belong to.
      config: the run's settings as plain nested dicts, ``RunConfig.to_dict()``.
      keep: checkpoints kept besides the best one; the latest is always kept.
      best_metric: name of the metric, among those given to `save`, that ranks checkpoints.
      best_mode: whether a larger ("max") or a smaller ("min") value of it is better.
      asynchronous: write in the background; `save` returns once the arrays are copied to host memory.

    Use it as a context manager: leaving it waits for the last write.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        fingerprint: str,
        config: Mapping[str, Any],
        keep: int = 2,
        best_metric: str = "accuracy",
        best_mode: Literal["max", "min"] = "max",
        asynchronous: bool = True,
    ) -> None:
        self.folder = Path(folder).absolute()
        self._run = snapshot.plain({"base": fingerprint, "config": config})
        self._best_metric = best_metric
        worst = -math.inf if best_mode == "max" else math.inf

        def rank(metrics: Mapping[str, float]) -> float:
            return metrics.get(best_metric, worst)

        policies = [
            managers.LatestN(max(keep, 1)),
            managers.BestN(get_metric_fn=rank, reverse=best_mode == "min", n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            best_fn=rank,
            best_mode=best_mode,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=asynchronous,
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "run": ocp.JsonCheckpointHandler(),
        }
        logging.getLogger("absl").addFilter(_is_news)
        _hush_cancelled_writes()
        with _io_errors(f"checkpoints {self.folder}", "a folder that can be written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def save(
        self, step: int, state: Any, data_state: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Write a checkpoint; returns False where one of this step exists already (a run's steps are repeatable).

        Args:
          step: optimizer steps done.
          state: any pytree of arrays. They may be donated to the next step as soon as this returns.
          data_state: position of the input pipeline, JSON values.
          metrics: held-out metrics at this step, with the best metric among them. A NaN never ranks.

        Raises:
          NaloraError: this write, or an earlier one in the background, failed. Earlier checkpoints are intact.
        """
        self.wait()
        if step in self._manager.all_steps():
            return False
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(snapshot.to_arrays(state)),
            data=ocp.args.JsonSave(snapshot.plain(data_state)),
            run=ocp.args.JsonSave(self._run),
        )
        ranked = metrics if metrics and math.isfinite(metrics[self._best_metric]) else None
        with self._write_errors():
            # force: Orbax skips steps below the latest one, which a run continued from its best checkpoint revisits.
            return bool(self._manager.save(step, args=arguments, metrics=_floats(ranked), force=True))

    def restore(self, which: Literal["latest", "best"] | int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The train state and data position of a checkpoint.

        Args:
          which: "latest", "best", or a step.
          like: the state's structure: arrays or ``ShapeDtypeStruct`` leaves. Where they carry shardings the arrays are
            restored into them, whatever topology wrote them; else onto the first device.

        Raises:
          NaloraError: there is no such checkpoint, it belongs to another base model or to other settings, its arrays
            have other names, shapes or dtypes, or its files are damaged.
        """
        step = self._find(which)
        where = f"checkpoint {self.folder / str(step)}"
        earlier = [other for other in self._manager.all_steps() if other < step]
        way_out = f"delete that folder to continue from step {max(earlier)}" if earlier else "start a new run"
        remedy = f"it is damaged: {way_out}"
        with _io_errors(where, "a readable checkpoint", remedy):
            small = ocp.args.Composite(run=ocp.args.JsonRestore(), data=ocp.args.JsonRestore())
            meta = self._manager.restore(step, args=small)
            saved = trees.flatten(self._manager.item_metadata(step).state.tree)
        snapshot.check_run(where, meta.run, self._run)
        wanted = snapshot.abstract(like)
        snapshot.check_arrays(where, saved, trees.flatten(wanted))
        with _io_errors(where, "a readable checkpoint", remedy):
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))
        return snapshot.from_arrays(restored.state, like), meta.data

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, None without any."""
        step: int | None = self._manager.latest_step()
        return step

    def best_step(self) -> int | None:
        """The step of the checkpoint with the best metric, None where none was measured."""
        step: int | None = self._manager.best_step()
        return step

    def metrics(self, step: int) -> dict[str, float] | None:
        """The metrics saved with a checkpoint."""
        found = self._manager.metrics(step)
        return None if found is None else dict(found)

    def wait(self) -> None:
        """Block until the write in the background is committed.

        Raises:
          NaloraError: it failed.
        """
        with self._write_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last write and release the threads.

        Raises:
          NaloraError: the last write failed.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except NaloraError as failed:  # the error that ended the run matters more
            error.add_note(str(failed))

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """A failed write leaves neither a half-written folder nor a step that is not there."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if jax.process_index() == 0:
                for scrap in self.folder.glob(f"*{ocp.path.atomicity_types.TMP_DIR_SUFFIX}*"):
                    shutil.rmtree(scrap, ignore_errors=True)
            self._manager.reload()
            raise NaloraError(
                f"checkpoint in {self.folder}",
                expected="to be written whole",
                found=_reason(error),
                remedy=f"steps {list(self._manager.all_steps())} are intact; make room, then continue with --resume",
            ) from error

    def _find(self, which: Literal["latest", "best"] | int) -> int:
        self.wait()
        step = {"latest": self.latest_step, "best": self.best_step}[which]() if isinstance(which, str) else which
        steps = list(self._manager.all_steps())
        if step is None or step not in steps:
            shown = f"steps {steps}" if steps else "no checkpoint"
            wanted = f"a checkpoint of step {which}" if isinstance(which, int) else f"a {which} checkpoint"
            raise NaloraError(f"checkpoints {self.folder}", expected=wanted, found=shown)
        return step


def prepare_output(folder: Path | str, resume: bool) -> Path:
    """A run's output folder, made or checked, so that no run ever writes over another one.

    With several processes, which share the folder, the first one decides for all, before any of them writes.

    Raises:
      NaloraError: the folder holds files and ``resume`` is off, ``resume`` is on and there is no checkpoint in it, or
        it cannot be written.
    """
    path = Path(folder)
    on_first_process(lambda: _claim(path, resume))
    return path


def _claim(path: Path, resume: bool) -> None:
    """Make or check the folder."""
    if path.exists() and not path.is_dir():
        raise NaloraError("--output", expected="a folder", found=f"the file {path}", remedy="choose another name")
    saved = path / FOLDER
    holds_files = path.is_dir() and any(path.iterdir())
    resumable = saved.is_dir() and any(ocp.path.step.standard_name_format().find_all(saved))
    if resume and not resumable:
        stopped = "the run in it stopped before its first checkpoint: delete the folder, or start in another one"
        remedy = stopped if holds_files else "start without --resume, or name the run's own --output"
        raise NaloraError("--resume", expected=f"a checkpoint in {saved}", found="none", remedy=remedy)
    if holds_files and not resume:
        raise NaloraError(
            "--output",
            expected="a new or empty folder",
            found=f"{path}, which holds {_listing(path)}",
            remedy="choose another folder" + (", or continue that run with --resume" if resumable else ""),
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NaloraError(f"--output {path}", expected="a folder that can be written", found=_reason(error)) from error


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record says what nothing else says.

    Orbax logs a background error with its traceback, up to four times, before it raises it, and warns at every save
    without metrics, which is what the steps between evaluations are.
    """
    repeated = record.exc_info or "tracked_metric" in str(record.msg)
    return not (repeated and "orbax" in record.pathname)


def _hush_cancelled_writes() -> None:
    """Hides the traceback of every write that was still under way when another one failed.

    TensorStore tells the event loop of such a write's end, which Orbax has closed by then, and prints what it gets for
    that. The failure itself is raised.
    """
    before = sys.unraisablehook
    if getattr(before, "__name__", "") == "without_closed_loops":
        return

    def without_closed_loops(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = without_closed_loops


@contextmanager
def _io_errors(where: str, expected: str, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except NaloraError:
        raise
    except Exception as error:  # the storage layers raise whatever they like, bare Exception among it
        raise NaloraError(where, expected=expected, found=_reason(error), remedy=remedy) from error


def _reason(error: Exception) -> str:
    """What the operating system or the innermost layer of storage said."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    system = re.search(r": ([^:]+) \[os_error_code", str(error))
    if system:
        return system[1]
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[0]
    return text if len(text) <= 200 else text[:200] + "..."


def _floats(metrics: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if metrics is None else {name: float(value) for name, value in metrics.items()}
