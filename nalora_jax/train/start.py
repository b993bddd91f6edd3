"""Initial adapters of a run: read from disk, or computed from the gradient of its first batches.

LoRA-GA's kernels are the base's kernels minus the initial update of its adapters. Another machine,
or another number of devices, would compute singular vectors with other signs, and so other kernels.
Therefore a resumed run reads the initial adapters:

    <output>/start/adapter.safetensors   the adapters before the first step, by path
                  /digests.json          SHA-256 of that file
"""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from nalora_jax.common import digests, trees
from nalora_jax.data.pipeline import BatchIterator
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.models.config import ModelConfig
from nalora_jax.train.assembly import Assembly, starting_at
from nalora_jax.train.initial_adapter import read_initial, warn_if_changed
from nalora_jax.train.initialise import gradient_adapters
from nalora_jax.train.output import START, Output
from nalora_jax.weights.model_files import LoadedModel

log = logging.getLogger(__name__)
_FILE = "adapter.safetensors"
GRADIENT = ("gradient", "lora_ga")  # the values of --lora.init that read batches


class _Rows(Protocol):
    def batches(self) -> BatchIterator: ...


def with_start(assembly: Assembly, loaded: LoadedModel, data: _Rows, output: Output) -> Assembly:
    """Returns the assembly with the initial adapters that the run's settings ask for.

    They are initialised in the gradient of the run's first batches, read from the adapter that the run
    continues, or those of the assembly. A resumed run gets its adapters from its checkpoint later;
    LoRA-GA's kernels are lowered by the stored initial adapters.

    Args:
      assembly: the run's program and weights.
      loaded: its base model.
      data: its rows.
      output: its folder.

    Raises:
      NaloraError: the initial adapters cannot be written or read, or are damaged; see also
        `nalora_jax.train.initial_adapter.read_initial`.
    """
    config, folder = assembly.config, output.folder / START
    if config.lora.init in GRADIENT:
        if output.resumes:
            return (
                starting_at(assembly, _read(folder, assembly))
                if config.lora.init == "lora_ga"
                else assembly
            )
        started = time.perf_counter()
        lora = first_adapters(assembly, loaded.config, data, config.seed)
        count = config.lora.gradient_batches
        seconds = time.perf_counter() - started
        log.info("adapters start in the gradient of %d batches: %.1f s", count, seconds)
        if config.lora.init == "gradient":
            return replace(assembly, state=assembly.begin(lora, config.seed))
        assembly = starting_at(assembly, lora)
        distributed.on_first_process(lambda: _write(folder, assembly.initial))
        return assembly
    if config.adapter and output.resumes:
        warn_if_changed(config)
    elif config.adapter:
        lora = read_initial(config, loaded)
        log.info("adapters start from %s (SHA-256 %s...)", config.adapter, config.adapter_sha256[:16])
        return replace(assembly, state=assembly.begin(lora, config.seed))
    return assembly


def first_adapters(assembly: Assembly, base: ModelConfig, data: _Rows, seed: int) -> dict[str, Any]:
    """Returns `gradient_adapters` of the first ``lora.gradient_batches`` batches of ``data``."""
    batches = data.batches()
    try:
        first_batches = itertools.islice(batches, assembly.config.lora.gradient_batches)
        first = list(distributed.global_batches(first_batches, assembly.mesh))
    finally:
        batches.close()
    return gradient_adapters(assembly, base, first, seed)


def _write(folder: Path, initial: Mapping[str, Any]) -> None:
    """Writes the folder atomically, by a rename."""
    scratch = folder.with_name(f".{folder.name}.new")
    try:
        scratch.mkdir()
        save_file(
            {path: np.ascontiguousarray(leaf) for path, leaf in trees.flatten(initial).items()},
            scratch / _FILE,
        )
        digests.write_digests(scratch)
        scratch.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NaloraError(str(folder), expected="a folder that can be written", found=reason) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read(folder: Path, assembly: Assembly) -> dict[str, Any]:
    """Reads the adapters that `_write` wrote, and checks them against the assembly's."""
    leaves = {}
    try:
        damage = digests.find_damage(folder)
        if damage is None:
            leaves = load_file(folder / _FILE)
    except (OSError, SafetensorError) as error:
        damage = getattr(error, "strerror", None) or str(error)
    shapes = {path: leaf.shape for path, leaf in trees.flatten(assembly.state.lora).items()}
    if damage is None and {path: leaf.shape for path, leaf in leaves.items()} != shapes:
        damage = "adapters of other projections or shapes"
    if damage is not None:
        raise NaloraError(
            str(folder),
            expected="the adapters that the run started from",
            found=damage,
            remedy="restore that folder from a copy; without it the run cannot go on",
        )
    return trees.unflatten({path: jax.numpy.asarray(leaf) for path, leaf in leaves.items()})
