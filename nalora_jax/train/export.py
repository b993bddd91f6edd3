"""Files of an exported adapter: PEFT files, verified by reloading, and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from nalora_jax.config import RunConfig
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.train.job import RunBase
from nalora_jax.train.machine import describe_device, versions
from nalora_jax.train.program import Assembly, exportable_adapter
from nalora_jax.weights.card import Card
from nalora_jax.weights.hub import alias_of
from nalora_jax.weights.model_files import LoadedModel, rope_of
from nalora_jax.weights.new_tokens import tokenizer_writer
from nalora_jax.weights.peft import export_adapter, verify_export


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


def run_card(
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
