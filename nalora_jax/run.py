"""One fine-tuning run from a config: wiring only, in the order in which things happen.

settings -> devices -> base model -> adapters and step -> data -> evaluate -> train -> evaluate -> export -> report
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from nalora_jax import distributed, trees
from nalora_jax.config import RunConfig, check
from nalora_jax.cpu import processor
from nalora_jax.data.pipeline import BatchIterator, TrainData, train_data
from nalora_jax.data.questions import held_out
from nalora_jax.data.sources import Source
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.heldout import Evaluator, describe
from nalora_jax.evaluate.statistics import compare
from nalora_jax.load import ADAPTER
from nalora_jax.models.decoder import Decoder
from nalora_jax.optim import make
from nalora_jax.optim.nalora import make_schedule
from nalora_jax.report.history import read_evaluation
from nalora_jax.train.assembly import Assembly, assemble, plain_adapter
from nalora_jax.train.checkpoint import FOLDER as CHECKPOINTS
from nalora_jax.train.checkpoint import Checkpointer, prepare_output
from nalora_jax.train.compilation import use_compilation_cache
from nalora_jax.train.initialise import gradient_adapters
from nalora_jax.train.inputs import check_data, check_rules
from nalora_jax.train.loop import FitResult, Schedule, fit
from nalora_jax.train.metrics import MetricsLog, SilentLog, write_atomically
from nalora_jax.train.progress import Progress
from nalora_jax.train.state import TrainState
from nalora_jax.weights import LoadedModel, load_model
from nalora_jax.weights.card import Card, write_card
from nalora_jax.weights.hub import alias_of, resolve
from nalora_jax.weights.peft import export_adapter, import_adapter, max_logit_difference, verify_export

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    folder: Path
    adapter: Path  # PEFT files of the best checkpoint
    report: Path
    before: Mapping[str, Any]  # held-out metrics of the base model
    after: Mapping[str, Any]  # of the adapter that was exported
    best_step: int


def run(config: RunConfig, *, source: Mapping[str, Source] | None = None) -> RunResult:
    """Fine-tunes; see the module's docstring. With several processes all of them do, and the first one logs and writes.

    Args:
      config: the run's settings.
      source: records by split (``{"train": ..., "validation": ...}``), in place of ``config.data.dataset``.

    Raises:
      NaloraError: bad settings, files or data; nothing of an earlier run is touched.
      TrainingDivergedError: the loss stopped being finite; the last good checkpoint is kept.
    """
    check(config)
    for text in config.mechanisms:
        make(text)  # an unknown name is said before anything is loaded
    distributed.initialize_distributed()
    folder = prepare_output(config.output, config.resume)
    if config.compute.compilation_cache:
        use_compilation_cache()
    mesh = distributed.make_mesh(config.mesh)
    started = time.perf_counter()
    kind = None if config.compute.quantize == "none" else config.compute.quantize
    files = resolve(config.model)
    if source is None:
        check_data(config.data)  # before minutes go into loading the weights
    check_rules(config.lora, files)
    loaded = load_model(files, dtype=config.compute.dtype, mesh=mesh, quantized=kind)
    log.info(
        "%s: %.0f MB of parameters in %s, loaded in %.1f s",
        loaded.source,
        trees.size_bytes(loaded.params) / 1e6,
        f"{kind} and {config.compute.dtype}" if kind else config.compute.dtype,
        time.perf_counter() - started,
    )
    assembly = assemble(config, loaded.config, loaded.params, mesh)
    log.info("%s adapter parameters on %s", f"{trees.count(assembly.state.lora):,}", describe_targets(assembly))
    data = _train_data(config, loaded, mesh, source)
    if config.lora.init == "gradient" and not config.resume:
        assembly = _gradient_start(assembly, loaded, data)
    log.info("training data: %s", json.dumps(data.describe()))
    reported, selecting = held_out(config.data, loaded.tokenizer, source=source)
    evaluator, selector = (
        Evaluator(assembly.eval_model, loaded.tokenizer, items, mesh=mesh if mesh.size > 1 else None)
        for items in (reported, selecting)
    )
    with Checkpointer(
        folder / CHECKPOINTS,
        fingerprint=loaded.fingerprint,
        config=config.to_dict(),
        keep=config.train.keep,
        best_metric=evaluator.metric,
        best_mode=evaluator.mode,
    ) as checkpointer:
        return _Run(config, folder, loaded, assembly, data, evaluator, selector, checkpointer).execute()


class _Run:
    """The stages after everything is in place; also the loop's hooks."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        loaded: LoadedModel,
        assembly: Assembly,
        data: TrainData,
        evaluator: Evaluator,
        selector: Evaluator,
        checkpointer: Checkpointer,
    ) -> None:
        self.config, self.folder, self.loaded, self.assembly = config, folder, loaded, assembly
        self.evaluator, self.selector, self.checkpointer = evaluator, selector, checkpointer
        self.batches: BatchIterator = data.batches()
        self.latest: dict[str, Any] = {}  # the evaluation of the current step

    def execute(self) -> RunResult:
        state, start = self._start()
        self.metrics, self.progress = self._records(start)
        with self.metrics, self.progress:
            origin = {} if self.loaded.origin is None else {"base": self.loaded.origin.to_dict()}
            self.metrics.start(self.config.to_dict(), versions=versions(), device=describe_device(), **origin)
            try:
                before = self._before(start)
                result = self._fit(state, start)
                best, after = self._best(result, before)
                adapter = self._export(best, before, after)
            except (NaloraError, KeyboardInterrupt) as error:
                self.metrics.write({"done": {"message": str(error) or "interrupted"}})
                raise
            self.metrics.write({"done": {"step": result.step, "best_step": after["step"]}})
        from nalora_jax.report.html import FILE, write_report  # Matplotlib, which the steps need not have beside them

        distributed.on_first_process(lambda: log.info("report: %s", write_report(self.folder)))
        return RunResult(self.folder, adapter, self.folder / FILE, before, after, after["step"])

    def _records(self, start: int) -> tuple[MetricsLog, Progress]:
        """The log and what is shown: of process 0; those of other processes keep and show nothing."""
        if jax.process_index():
            return SilentLog(), Progress(self.config.steps, console=Console(quiet=True))
        log = MetricsLog(self.folder, tensorboard=self.config.tensorboard, resume=start or None)
        return log, Progress(self.config.steps, start=start)

    def _start(self) -> tuple[TrainState, int]:
        if not self.config.resume:
            return self.assembly.state, 0
        state, position = self.checkpointer.restore("latest", self.assembly.state)
        self.batches.set_state(position)
        start = int(state.step)
        log.info("resumed from step %d", start)
        return state, start

    def _before(self, start: int) -> dict[str, Any]:
        """Held-out metrics of the base model: measured by a new run, read back by a resumed one."""
        saved = self.folder / "before.json"
        if start and saved.exists():
            return read_evaluation(saved)
        before = self.evaluator.measure(self.loaded.params, None, samples=True)
        distributed.on_first_process(lambda: write_atomically(saved, json.dumps(before)))
        self.metrics.write({"step": 0, "initial": True, "eval": _without(before, "right")})
        self.progress.say(f"before: {describe(before)}")
        self._record_evaluation(0, self.selector.measure(self.loaded.params, None))
        return before

    def _fit(self, state: TrainState, start: int) -> FitResult:
        train = self.config.train
        schedule = Schedule(self.config.steps, train.log_every, train.eval_every, train.save_every, train.patience)
        rate = make_schedule(self.config.optimizer, self.config.steps)
        with_mesh = _on_mesh(self.batches, self.assembly.mesh)
        return fit(
            self.assembly.step,
            self.assembly.view(self.assembly.params),
            state,
            with_mesh,
            self,
            schedule,
            rate,
            start=start,
        )

    def _best(self, result: FitResult, before: Mapping[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """The state whose evaluation was best, and its metrics on the examples that had no say in that."""
        self.checkpointer.wait()
        step = self.checkpointer.best_step()
        state = result.state
        if step is not None and step != result.step:
            log.info("the best evaluation was at step %d: exporting that one", step)
            state, _ = self.checkpointer.restore(step, self.assembly.state)
        after = self.evaluator.measure(self.assembly.params, state.lora, samples=True)
        if "right" in after and "right" in before:
            after["paired"] = asdict(compare(before["right"], after["right"]))
        record = {"step": int(state.step), "final": True, "eval": _without(after, "right")}
        self.metrics.write(record)
        self.progress.say(f"after (step {record['step']}): {describe(after)}")
        return state, after | {"step": int(state.step)}

    def _export(self, state: TrainState, before: Mapping[str, Any], after: Mapping[str, Any]) -> Path:
        """PEFT files of the trained adapter, read back and compared before anybody is told that they exist."""
        folder, loaded = self.folder / ADAPTER, self.loaded
        lora, spec = plain_adapter(self.assembly, state.lora)

        def write() -> None:
            export_adapter(
                lora,
                spec,
                loaded.config,
                folder,
                base_model_name=loaded.source,
                fingerprint=loaded.fingerprint,
                overwrite=True,
            )
            verify_export(folder, lora, spec, loaded.config, fingerprint=loaded.fingerprint)

        distributed.on_first_process(write)
        difference = self._exported_difference(state.lora, folder)
        distributed.on_first_process(lambda: write_card(folder, self._card(before, after)))
        log.info("adapter: %s (read back: logits differ by at most %.1e)", folder, difference)
        return folder

    def _exported_difference(self, lora: Any, folder: Path) -> float:
        """Largest difference between the logits of the trained adapter and of the files, on one training row."""
        batch = next(iter(self.batches))
        row = {name: batch[name][0, :1] for name in ("tokens", "positions", "segment_ids")}
        row = multihost_utils.broadcast_one_to_all(row)
        files, spec = import_adapter(folder, self.loaded.config, fingerprint=self.loaded.fingerprint)

        def logits(model: Decoder, params: Any, lora: Any) -> Any:
            @jax.jit
            def apply(variables: Any) -> jax.Array:
                hidden = model.apply(
                    variables, row["tokens"], positions=row["positions"], segment_ids=row["segment_ids"]
                )
                return model.apply(variables, hidden[:, ::8], method="unembed")

            return distributed.fetch(apply({"params": params, "lora": lora}))

        model = self.assembly.eval_model
        found = max_logit_difference(
            lambda _: logits(model, self.assembly.params, lora),
            lambda _: logits(model.clone(adapters=spec), self.loaded.params, files),
            row["tokens"],
        )
        # PiSSA's residual was rounded to the base's dtype once; nothing else differs by more than a sum's order.
        rounded = self.config.lora.init == "pissa" and self.config.compute.dtype == "bfloat16"
        if not found < (0.05 if rounded else 1e-3):
            raise NaloraError(
                str(folder), expected="the trained adapter's logits", found=f"a difference of {found:.1e}"
            )
        return found

    def _card(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> Card:
        alias = alias_of(self.config.model)
        return Card(
            "adapter",
            self.loaded.source,
            self.assembly.spec,
            run=self.config,
            license=alias.parts[0].licence if alias else "",
            before=before,
            after=after,
            versions=versions(),
            device=describe_device(),
            origin=self.loaded.origin,
        )

    # ------------------------------------------------------------ hooks of the loop

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self.progress.advance(step)

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Write and show a log step."""
        self.metrics.write({"step": step, **record})
        self.progress.log(step, record)

    def evaluate(self, step: int, state: TrainState) -> float:
        """Measure the adapter on the held-out examples that choose the checkpoint."""
        self.latest = self.selector.measure(self.assembly.params, state.lora)
        self._record_evaluation(step, self.latest)
        value = float(self.latest[self.selector.metric])
        return value if self.selector.mode == "max" else -value

    def save(self, step: int, state: TrainState, metric: float | None) -> None:
        """Start writing a checkpoint."""
        name: str = self.selector.metric
        measured = None if metric is None else {name: float(self.latest[name])}
        self.checkpointer.save(step, state, self.batches.get_state(), measured)

    def _record_evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        self.metrics.write({"step": step, "eval": values})
        self.progress.say(f"step {step}: {describe(values)}")


def _gradient_start(assembly: Assembly, loaded: LoadedModel, data: TrainData) -> Assembly:
    """The assembly with adapters that start where the gradient of the run's first batches lies."""
    started, batches, config = time.perf_counter(), data.batches(), assembly.config
    try:
        with_mesh = _on_mesh(batches, assembly.mesh)
        first = [next(with_mesh) for _ in range(config.lora.gradient_batches)]
    finally:
        batches.close()
    lora = gradient_adapters(assembly, loaded.config, first, config.seed)
    log.info("adapters start in the gradient of %d batches: %.1f s", len(first), time.perf_counter() - started)
    return replace(assembly, state=assembly.begin(lora, config.seed))


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _train_data(
    config: RunConfig, loaded: LoadedModel, mesh: Mesh, source: Mapping[str, Source] | None = None
) -> TrainData:
    """The rows of this process; the mesh decides which those are."""
    train = config.train
    data = train_data(
        config.data,
        loaded.tokenizer,
        batch_size=train.batch_size,
        accumulate=train.accumulate,
        seed=config.seed,
        rows=distributed.process_rows(mesh, train.batch_size // train.accumulate).tolist(),
        source=source,
    )
    longest, context = int(data.store.lengths.max()), loaded.config.max_positions
    if longest > context:
        raise NaloraError(
            "training data",
            expected=f"examples of at most {context} tokens, the model's context",
            found=f"one of {longest}",
            remedy=f"set --data.max-length to {context} or less",
        )
    return data


def _on_mesh(batches: BatchIterator, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    for batch in batches:
        yield distributed.make_global_batch(batch, mesh, rows_axis=1)


def describe_targets(assembly: Assembly) -> str:
    """Adapted projections with their ranks, e.g. ``ffn/gate_proj (8), ffn/up_proj (8)``."""
    return ", ".join(f"{path.removeprefix('layers/')} ({spec.rank})" for path, spec in assembly.spec.targets)


def describe_device() -> str:
    """Kind and number of devices, and the processor behind a CPU device."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"{processor.name()}, {os.cpu_count()} cores"
    return f"{jax.device_count()} x {device.platform} ({kind})"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes."""
    names = ("nalora_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # this library, run from a checkout that was never installed
        return "not installed"
