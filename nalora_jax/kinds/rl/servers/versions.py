"""Versions of the adapter as folders that servers load, each under a name with step and digest."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nalora_jax.common import buckets, trees
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.weights.peft_config import TENSORS_NAME
from nalora_jax.weights.peft_export import export_adapter


class Version(NamedTuple):
    """The adapter of one step, as servers know it."""

    step: int
    name: str
    path: str  # as servers see it
    size: int  # bytes of its tensors


@dataclass(frozen=True)
class Exports:
    """The folder of versions that trainer and servers share.

    Attributes:
      folder: path or URL of a bucket.
      server_path: the same folder as servers see it.
      run: a few characters of the run, the beginning of all names.
      config: of the base model.
      spec: of the adapters.
    """

    folder: str
    server_path: str
    run: str
    config: ModelConfig
    spec: AdapterSpec

    @property
    def prefix(self) -> str:
        """Returns the beginning of the names of this run's versions."""
        return f"nalora-{self.run}-"

    @property
    def rank(self) -> int:
        """Returns the largest rank."""
        return max(max(target.ranks) for _, target in self.spec.targets)

    def write(self, lora: Any, step: int) -> Version:
        """Exports the adapter ``lora``, on the host, and returns its version.

        A folder of this name, from before the run was killed, has the same content.

        Raises:
          NaloraError: vLLM cannot serve the adapter, or the folder cannot be written.
        """
        digest = hashlib.sha256()
        size = 0
        for path, leaf in trees.flatten(lora).items():
            array = np.asarray(leaf)
            digest.update(path.encode() + array.tobytes())
            size += array.nbytes
        name = f"{self.prefix}{step}-{digest.hexdigest()[:12]}"
        target = f"{self.folder.rstrip('/')}/{name}"
        if not self._exists(target):
            export_adapter(
                lora,
                self.spec,
                self.config,
                target,
                base_model_name="base",
                target="vllm",
                max_lora_rank=self.rank,
            )
        return Version(step, name, f"{self.server_path.rstrip('/')}/{name}", size)

    def remove(self, version: Version) -> None:
        """Removes the folder of a version that no server needs; one in a bucket stays."""
        if not buckets.is_url(self.folder):
            shutil.rmtree(Path(self.folder) / version.name, ignore_errors=True)

    def _exists(self, target: str) -> bool:
        """Returns True if a folder has a version's tensors."""
        file = f"{target}/{TENSORS_NAME}"
        if buckets.is_url(self.folder):
            return buckets.exists(file)
        return Path(file).exists()
