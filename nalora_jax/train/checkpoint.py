"""Checkpoints of a run: the trained state, the data position, and the run that they belong to.

Orbax writes checkpoints in the background and commits each by a rename, or in a bucket by a commit
file, so a checkpoint is complete or absent. Before the commit, the SHA-256 of every file is written
next to it. `Checkpointer.restore` checks the digests first: a checkpoint that was corrupted later
is moved aside, and the previous one is restored. Checkpoints do not contain the frozen base
weights, but the base model's fingerprint and the run's settings. Restoring into another model or
other settings raises an error that lists the differences.

    <output>/checkpoints/<step>/state    arrays: step, adapters, optimizer, gate EMAs, random key
                               /data     position of the input pipeline
                               /run      fingerprint of the base, settings, a copy of metrics
                               /metrics  held-out metrics, if they were measured at that step
    <output>/checkpoints.damaged/<step>  damaged checkpoints
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from nalora_jax.common import buckets, digests, files, trees
from nalora_jax.errors import NaloraError
from nalora_jax.mesh.processes import check_lost_peer, run_on_first_process, tell_all
from nalora_jax.train import snapshot

log = logging.getLogger(__name__)
_ITEMS = ("state", "data", "run")
_MISPLACED = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class Checkpointer(AbstractContextManager["Checkpointer"]):
    """The checkpoints of one run in one folder.

    Args:
      folder: folder in a file system or a bucket (``gs://...``); created if missing. Remains of an
        interrupted save are removed.
      fingerprint: fingerprint of the base model that the adapters belong to.
      config: the run's settings as plain nested dicts, ``RunConfig.to_dict()``.
      keep: number of latest checkpoints to keep, at least 1, in addition to the best one.
      best_metric: name of the metric, among the metrics passed to `save`, that ranks checkpoints.
      best_mode: "max" if a larger value of it is better, "min" if a smaller one is.

    Use it as a context manager: leaving it waits for the last write.
    """

    def __init__(
        self,
        folder: Path | str | epath.Path,
        *,
        fingerprint: str,
        config: Mapping[str, Any],
        keep: int = 2,
        best_metric: str = "accuracy",
        best_mode: Literal["max", "min"] = "max",
    ) -> None:
        """Opens the folder, after moving checkpoints aside that Orbax cannot open."""
        where = buckets.url(str(folder))
        if where:
            self.folder: Any = epath.Path(where)
        else:
            self.folder = Path(folder).absolute()
        self._run = snapshot.plain({"base": fingerprint, "config": config})
        self._best_metric = best_metric
        worst = {"max": -math.inf, "min": math.inf}[best_mode]

        def rank(metrics: Mapping[str, float]) -> float:
            """Returns the metric of a checkpoint; the worst value if it was not measured."""
            return metrics.get(best_metric, worst)

        policies = [
            # A checkpoint is kept if one of the policies keeps it.
            managers.LatestN(max(keep, 1)),
            managers.BestN(
                get_metric_fn=rank,
                reverse=best_mode == "min",
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            best_fn=rank,
            best_mode=best_mode,
            cleanup_tmp_directories=True,
        )
        logging.getLogger("absl").addFilter(_is_news)
        _hush_cancelled_writes()
        with _io_errors(f"checkpoints {self.folder}", "a folder that can be written"):
            run_on_first_process(self._set_unreadable_aside)
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, handler_registry=handlers()
            )

    def save(
        self,
        step: int,
        state: Any,
        data_state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Writes a checkpoint; returns False if one of this step exists (steps are repeatable).

        Args:
          step: optimizer steps done.
          state: any pytree of arrays. They may be donated to the next step as soon as this returns.
          data_state: position of the input pipeline, JSON values.
          metrics: held-out metrics at this step, with the best metric among them. NaN is never
            ranked.

        Raises:
          NaloraError: this write, or an earlier one in the background, failed. Earlier checkpoints
            are intact.
        """
        self.wait()
        if step in self._manager.all_steps():
            return False
        ranked = None
        if metrics and math.isfinite(metrics[self._best_metric]):
            ranked = {name: float(value) for name, value in metrics.items()}
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(snapshot.to_arrays(state)),
            data=ocp.args.JsonSave(snapshot.plain(data_state)),
            run=ocp.args.JsonSave(self._run | {"metrics": ranked}),
        )
        with self._write_errors():
            # force: Orbax skips steps below the latest one, which a run resumed from its best
            # checkpoint saves again.
            return bool(
                self._manager.save(step, args=arguments, metrics=ranked, force=True)
            )

    def restore(
        self, which: Literal["latest", "best"] | int, like: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the train state and the data position of a checkpoint.

        If the latest or best checkpoint is damaged, it is moved to ``<folder>.damaged`` with a
        warning, and the next latest or best one is restored.

        Args:
          which: "latest", "best", or a step.
          like: the state's structure: arrays or ``ShapeDtypeStruct`` leaves. If they have
            shardings, the arrays are restored into them, independent of the topology that wrote
            them; otherwise onto the first device.

        Raises:
          NaloraError: there is no such checkpoint, it belongs to another base model or to other
            settings, its arrays have other names, shapes or dtypes, or its files are damaged and
            there is no intact checkpoint to fall back to.
        """
        while True:
            step = self._find(which)
            # Orbax ranks by this copy of the metrics; `_damage` compares it with the digested one.
            ranked = self.metrics(step)
            with _io_errors(
                f"checkpoint {self.folder / str(step)}", "a readable checkpoint"
            ):
                damage = tell_all(partial(self._damage, step, ranked))
            if damage is None:
                return self._read(step, like)
            earlier = [other for other in self._manager.all_steps() if other != step]
            if isinstance(which, int) or not earlier:
                raise NaloraError(
                    f"checkpoint {self.folder / str(step)}",
                    expected="the files that were written",
                    found=f"a damaged one ({damage})",
                    remedy=f"steps {earlier} are there as well"
                    if earlier
                    else "start a new run in another --output",
                )
            run_on_first_process(partial(self._set_aside, step, damage))
            self._manager.reload()
            # The only ranked checkpoint was damaged.
            if which == "best" and self.best_step() is None:
                which = "latest"

    def _damage(self, step: int, metrics: Mapping[str, float] | None) -> str | None:
        """Returns the difference between a checkpoint and its digests; None if there is none."""
        folder = epath.Path(self.folder / str(step))
        try:
            for item in _ITEMS:
                if (damage := digests.find_damage(folder / item)) is not None:
                    return f"{item}: {damage}"
            written = json.loads((folder / "run" / JSON).read_text()).get("metrics")
        # Other errors are failures of the disk to read, not damage.
        except (*_MISPLACED, ValueError, RecursionError) as error:
            return _reason(error)
        if written != metrics:
            return "metrics: not what was written"
        return None

    def _set_aside(self, step: int, damage: str) -> None:
        """Moves a damaged checkpoint aside, so that its step can be written again."""
        aside = self.folder.with_name(f"{self.folder.name}.damaged")
        files.move_tree(self.folder / str(step), aside / str(step))
        log.warning(
            "checkpoint %d is damaged (%s): moved to %s, taking an earlier one",
            step,
            damage,
            aside,
        )

    def _set_unreadable_aside(self) -> None:
        """Moves checkpoints with invalid metrics aside.

        Orbax reads the metrics of all checkpoints when it opens a folder, and fails on invalid
        JSON.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in list(self.folder.glob("*/metrics/metrics")):
            try:
                json.loads(path.read_bytes())
            except (IsADirectoryError, ValueError, RecursionError):
                step = path.parent.parent.name
                if step.isdecimal():
                    self._set_aside(int(step), "metrics: not what was written")

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Checks and restores the checkpoint of ``step``."""
        where = f"checkpoint {self.folder / str(step)}"
        with _io_errors(where, "a readable checkpoint"):
            small = ocp.args.Composite(
                run=ocp.args.JsonRestore(), data=ocp.args.JsonRestore()
            )
            meta = self._manager.restore(step, args=small)
            saved = trees.flatten(self._manager.item_metadata(step).state.tree)
        snapshot.check_saved_config(where, meta.run, self._run)
        abstract = snapshot.abstract(like)
        snapshot.check_arrays(where, saved, trees.flatten(abstract))
        with _io_errors(where, "a readable checkpoint"):
            restore_args = ocp.args.PyTreeRestore(
                abstract, ocp.checkpoint_utils.construct_restore_args(abstract)
            )
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=restore_args)
            )
        return snapshot.from_arrays(restored.state, like), meta.data

    def latest_step(self) -> int | None:
        """Returns the newest checkpoint's step; None without checkpoints."""
        step: int | None = self._manager.latest_step()
        return step

    def best_step(self) -> int | None:
        """Returns the step of the checkpoint with the best metric; None without metrics."""
        step: int | None = self._manager.best_step()
        return step

    def metrics(self, step: int) -> dict[str, float] | None:
        """Returns the metrics saved with a checkpoint."""
        metrics = self._manager.metrics(step)
        if metrics is None:
            return None
        return dict(metrics)

    def wait(self) -> None:
        """Blocks until the write in the background is committed.

        Raises:
          NaloraError: the write failed.
        """
        with self._write_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last write and releases the threads.

        Raises:
          NaloraError: the last write failed.
        """
        with self._write_errors():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def __exit__(
        self, kind: object, error: BaseException | None, trace: object
    ) -> None:
        """Closes the checkpoints; a failed last write becomes a note of an error in the block."""
        if error is None:
            self.close()
            return
        try:
            self.close()
        except NaloraError as failed:  # the error that ended the run matters more
            error.add_note(str(failed))

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Converts errors of a write, and removes the incomplete folder and the uncommitted step.

        Raises:
          NaloraError: the storage failed, with its message; a `LostPeerError` if another process is
            gone.
        """
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if jax.process_index() == 0:
                for scrap in list(
                    self.folder.glob(f"*{ocp.path.atomicity_types.TMP_DIR_SUFFIX}*")
                ):
                    with suppress(OSError):
                        epath.Path(scrap).rmtree()
            check_lost_peer(error)
            # Reloading also drops the failed step, which the manager already counts as saved.
            steps: list[int] = []
            with suppress(OSError):  # the folder may have been deleted
                self._manager.reload()
                steps = list(self._manager.all_steps())
            remedy = f"steps {steps} are intact; make room, then continue with --resume"
            if not steps:
                remedy = (
                    "no step is saved: make room, and start again in another --output"
                )
            where = f"checkpoint in {self.folder}"
            expected = "to be written whole"
            actual = _reason(error)
            raise NaloraError(
                where, expected=expected, found=actual, remedy=remedy
            ) from error

    def _find(self, which: Literal["latest", "best"] | int) -> int:
        """Returns the step of a checkpoint, after waiting for the last write.

        Raises:
          NaloraError: there is no such checkpoint; it lists the available ones.
        """
        self.wait()
        expected = f"a {which} checkpoint"
        if which == "latest":
            step = self.latest_step()
        elif which == "best":
            step = self.best_step()
        else:
            step = which
            expected = f"a checkpoint of step {which}"
        steps = list(self._manager.all_steps())
        if step is None or step not in steps:
            available = f"steps {steps}" if steps else "no checkpoint"
            raise NaloraError(
                f"checkpoints {self.folder}", expected=expected, found=available
            )
        return step


def _is_news(record: logging.LogRecord) -> bool:
    """Returns False for log records of Orbax that repeat known facts.

    Orbax logs a background error with its traceback, up to four times, before it raises the error.
    It also warns at every save without metrics, which is normal between evaluations.
    """
    repeated = record.exc_info or "tracked_metric" in str(record.msg)
    return not (repeated and "orbax" in record.pathname)


def _hush_cancelled_writes() -> None:
    """Hides the traceback of every write that was unfinished when another one failed.

    TensorStore reports the end of such a write to an event loop that Orbax has already closed, and
    prints the resulting error. The failure itself is raised.
    """
    before = sys.unraisablehook
    if getattr(before, "__name__", "") == "without_closed_loops":
        return

    def without_closed_loops(unraisable: sys.UnraisableHookArgs) -> None:
        """Passes all errors but the one of a closed event loop to the earlier hook."""
        error = unraisable.exc_value
        if not (
            isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        ):
            before(unraisable)

    sys.unraisablehook = without_closed_loops


@contextmanager
def _io_errors(where: str, expected: str) -> Iterator[None]:
    """Converts all errors in the block to a NaloraError about ``where``."""
    try:
        yield
    except NaloraError:
        raise
    except Exception as error:
        # Storage layers raise any type, including bare Exception.
        raise NaloraError(where, expected=expected, found=_reason(error)) from error


def _reason(error: Exception) -> str:
    """Returns the message of the operating system or of the innermost storage layer."""
    # Storage layers wrap the error that has the reason.
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    system = re.search(r": ([^:]+) \[(?:os_error_code|tensorstore_spec)=", str(error))
    if system:
        return system[1]
    text = (
        (getattr(error, "strerror", None) or str(error) or type(error).__name__)
        .strip()
        .splitlines()[0]
    )
    return text if len(text) <= 200 else text[:200] + "..."


JSON = "metadata"  # Orbax's name for the file of a JSON item
# Replicas of an array share its writing if each has at least this many bytes to write. With Orbax's
# default, any size, the first save compiles a slice for every array and device, which costs more
# than it gains for arrays as small as adapters.
_LEAST_SHARE = 16 << 20  # bytes


class _Digested:
    """Part of a handler that writes the digests of an item's files, once all processes have written
    theirs."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)  # type: ignore[misc]
        digests.write_digests(directory)


class _DigestedArrays(_Digested, ocp.PyTreeCheckpointHandler):
    """Orbax's handler of array trees, with digests; host arrays are stored as well."""

    def __init__(self) -> None:
        arrays = ocp.type_handlers.ArrayHandler(
            min_slice_bytes_for_replica_parallel=_LEAST_SHARE
        )
        on_host = ocp.type_handlers.NumpyHandler()
        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, on_host)
        )
        super().__init__(type_handler_registry=registry)


class _DigestedJson(_Digested, ocp.JsonCheckpointHandler):
    pass


def handlers() -> Any:
    """Returns the registry of checkpoint handlers by item."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    arrays = _DigestedArrays()
    for arguments in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        # An item is written and read by the same handler.
        registry.add("state", arguments, arrays)
    for item in ("data", "run"):
        handler = _DigestedJson(JSON)
        for arguments in (ocp.args.JsonSave, ocp.args.JsonRestore):
            registry.add(item, arguments, handler)
    return registry
