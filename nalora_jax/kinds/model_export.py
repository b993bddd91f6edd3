"""The exported model of a run that trains weights of the base: a Hugging Face folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nalora_jax.assembly.start import exportable_adapter
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.record import Job
from nalora_jax.mesh import processes
from nalora_jax.method.tuned import cast_tuned
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.weights.hf import SafetensorsFolder
from nalora_jax.weights.merge import merged_tensors, write_merged
from nalora_jax.weights.model_files import LoadedModel
from nalora_jax.weights.new_tokens import tokenizer_writer
from nalora_jax.weights.peft_tables import fold_saved

log = logging.getLogger(__name__)


def export_model(job: Job, folder: Path, lora: Any) -> AdapterSpec:
    """Writes the whole model, with its adapters folded in, reads it back and compares.

    The weights have ``--compute.dtype``, in which the run computed with them. All processes call
    it, and each needs memory for them.

    Args:
      job: the run.
      folder: of the run, new or with an earlier export, which is replaced.
      lora: the trained leaves to export.

    Returns:
      The run's adapters and trained weights.

    Raises:
      NaloraError: the files cannot be written, or differ from the trained weights.
    """
    loaded = job.loaded
    assert isinstance(loaded, LoadedModel)
    weights, adapters = cast_tuned(job.assembly.params, lora, job.config.compute.dtype)
    weights = jax.tree.map(processes.fetch, weights)
    spec = job.assembly.spec
    if adapters:
        adapters, spec = exportable_adapter(job.assembly, adapters)
    config, weights, spec = fold_saved(loaded.config, weights, adapters, spec)
    hf_config: Mapping[str, Any] = loaded.hf_config
    if loaded.config.tie_embeddings and not config.tie_embeddings:
        hf_config = {**hf_config, "tie_word_embeddings": False}
    assert job.inputs.files is not None
    files = job.inputs.files.resolved.path

    def write() -> None:
        write_merged(
            folder,
            config,
            weights,
            adapters,
            spec,
            hf_config=hf_config,
            tokenizer=tokenizer_writer(loaded, files=files),
            overwrite=True,
        )
        check_files(folder, merged_tensors(config, weights, adapters, spec))

    processes.run_on_first_process(write)
    log.info("model: %s (read back: equal)", folder)
    return job.assembly.spec


def check_files(folder: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Checks that a folder has these tensors, bit for bit.

    Raises:
      NaloraError: a tensor differs.
    """
    source = SafetensorsFolder(folder)
    for name, expected in tensors:
        whole = tuple(slice(0, size) for size in expected.shape)
        found = source.read(name, whole)
        if found.tobytes() != expected.tobytes():
            raise NaloraError(
                f"{folder}: {name}", expected="the trained weights", found="others"
            )
