"""Export of a run's adapter: PEFT files, verified by reloading, and a model card."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils

from nalora_jax.config import RunConfig
from nalora_jax.data.pipeline import BatchIterator
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.method.step import TrainState
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.train.assembly import Assembly, exportable_adapter
from nalora_jax.train.machine import describe_device, versions
from nalora_jax.train.pieces import RunBase
from nalora_jax.weights.base import LoadedModel, rope_of
from nalora_jax.weights.card import Card
from nalora_jax.weights.hub import alias_of
from nalora_jax.weights.new_tokens import tokenizer_writer
from nalora_jax.weights.peft import export_adapter, import_adapter, max_logit_difference, verify_export

log = logging.getLogger(__name__)


def export(
    config: RunConfig,
    folder: Path,
    loaded: LoadedModel,
    assembly: Assembly,
    state: TrainState,
    batches: BatchIterator,
    share: Callable[[str], None],
) -> Path:
    """Writes PEFT files of the trained adapter and verifies them by reloading.

    Args:
      config: the run's settings.
      folder: new, or an earlier export, which is replaced.
      loaded: the base model.
      assembly: the run's adapters and model.
      state: the state to export.
      batches: rows that logits are compared on.
      share: makes a folder of the first process readable in all; see
        `nalora_jax.train.output.Output.share`.

    Raises:
      NaloraError: the files cannot be written, or differ from the trained adapter.
    """
    lora, spec = exportable_adapter(assembly, state.lora)
    distributed.on_first_process(lambda: write_adapter(folder, loaded, lora, spec, overwrite=True))
    share(folder.name)
    difference = _difference(loaded, assembly, state.lora, folder, batches)
    # Lowered kernels were rounded to the base's dtype once. All other differences come from the
    # order of summation.
    rounded = assembly.initial is not None and config.compute.dtype == "bfloat16"
    if not difference < (0.05 if rounded else 1e-3):
        raise NaloraError(
            str(folder), expected="the trained adapter's logits", found=f"a difference of {difference:.1e}"
        )
    log.info("adapter: %s (read back: logits differ by at most %.1e)", folder, difference)
    return folder


def write_adapter(
    folder: Path, loaded: LoadedModel, lora: Mapping[str, Any], spec: AdapterSpec, **options: Any
) -> float:
    """Writes PEFT files of an adapter and verifies them; returns the difference (`verify_export`).

    ``options`` are passed to `export_adapter`.
    """
    export_adapter(
        lora,
        spec,
        loaded.config,
        folder,
        base_model_name=original(loaded),
        base_weights=loaded.source if original(loaded) != loaded.source else "",
        fingerprint=loaded.fingerprint,
        rope_scaling=loaded.rope_scaling,
        write_extra=tokenizer_writer(loaded) if loaded.added or loaded.resized else None,
        **options,
    )
    return verify_export(folder, lora, spec, loaded.config, fingerprint=loaded.fingerprint)


def original(loaded: RunBase) -> str:
    """Returns the name under which other tools load the base: of a copy, its original's hub id."""
    return (loaded.origin and loaded.origin.copy_of) or loaded.source


def _difference(
    loaded: LoadedModel, assembly: Assembly, lora: Any, folder: Path, batches: BatchIterator
) -> float:
    """Returns the largest logit difference of trained and exported adapter on one training row."""
    batch = next(iter(batches))
    names = ("tokens", "positions", "segment_ids", "pixels")
    row = {name: batch[name][0, :1] for name in names if name in batch}
    row = multihost_utils.broadcast_one_to_all(row)
    files, spec = import_adapter(folder, loaded.config, fingerprint=loaded.fingerprint)

    def logits(model: Decoder, params: Any, lora: Any) -> Any:
        @jax.jit
        def apply(variables: Any) -> jax.Array:
            images = {}
            if "pixels" in row:
                assert loaded.processor is not None
                pixels = loaded.processor.normalise(row["pixels"])
                images["features"] = model.apply(variables, pixels, method="see")
            layout = {"positions": row["positions"], "segment_ids": row["segment_ids"]}
            hidden = model.apply(variables, row["tokens"], **layout, **images)
            return model.apply(variables, hidden[:, ::8], method="unembed")

        return distributed.fetch(apply({"params": params, "lora": lora}))

    model = assembly.eval_model
    return max_logit_difference(
        lambda _: logits(model, assembly.params, lora),
        lambda _: logits(model.clone(adapters=spec), loaded.params, files),
        row["tokens"],
    )


def card(
    config: RunConfig,
    loaded: RunBase,
    assembly: Assembly,
    lora: Any,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> Card:
    """Returns the README.md of the adapter ``lora``, with the run's settings and results."""
    spec = exportable_adapter(assembly, lora)[1] if assembly.spec.adalora else assembly.spec
    return replace(
        base_card("adapter", config.model, loaded, spec),
        run=config,
        before=before,
        after=after,
        versions=versions(),
        device=describe_device(),
    )


def base_card(kind: Literal["adapter", "merged"], model: str, loaded: RunBase, spec: AdapterSpec) -> Card:
    """Returns a card without settings and results of a run; ``model`` is the name of the base."""
    alias = alias_of(model)
    licence = alias.package.licence if alias else ""
    written = Card(kind, original(loaded), spec, license=licence, origin=loaded.origin)
    if isinstance(loaded, LoadedModel):
        return replace(written, resized=loaded.resized, rope=rope_of(loaded))
    return written
