"""Loads a dual encoder by name, with its adapter; see `nalora_jax.loading.adapted` for decoders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nalora_jax.config import config_from_dict
from nalora_jax.evaluate.image_evaluation import Encoders
from nalora_jax.loading.located import Located, locate
from nalora_jax.mesh.distributed import platform_of
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.models.vision.dual_encoder import DualEncoder
from nalora_jax.ops.dispatch import numerics_for
from nalora_jax.weights.dual_base import LoadedDual, load_dual
from nalora_jax.weights.peft_import import import_adapter


@dataclass(frozen=True)
class AdaptedDual:
    """A dual encoder, with or without an adapter, ready to run."""

    base: LoadedDual
    encoders: Encoders
    lora: dict[str, Any] | None
    located: Located
    spec: AdapterSpec  # ranks and alphas of the adapter; empty without one

    @property
    def variables(self) -> dict[str, Any]:
        """Returns the variables for the encoders."""
        collections = {"params": self.base.params, "lora": self.lora}
        return {name: tree for name, tree in collections.items() if tree is not None}


def load_adapted_dual(
    model: str, *, adapter: str | Path | None = None, dtype: str | None = None
) -> AdaptedDual:
    """Loads the dual encoder called ``model`` and applies its adapter.

    Args:
      model: a name for `nalora_jax.weights.dual_base.load_dual`; or the folder of a run or of
        an adapter.
      adapter: folder of a run or of an adapter; allowed only if ``model`` is a base.
      dtype: of the base weights; by default the run's, otherwise float32.

    Raises:
      NaloraError: see `nalora_jax.loading.located.locate` and `load_dual`.
    """
    located = locate(model, adapter)
    run = config_from_dict(located.run)
    dtype = dtype or (run.compute.dtype if located.run else "float32")
    vision = run.vision
    base = load_dual(
        located.base,
        dtype=dtype,
        d_out=vision.features,
        loss=vision.loss,
        seed=run.seed,
        image_size=vision.image_size,
    )
    lora = None
    spec = AdapterSpec()
    if located.adapter is not None:
        lora, spec = import_adapter(
            located.adapter, base.config, fingerprint=base.fingerprint
        )
    module = DualEncoder(
        # Dropout is for training.
        base.config,
        replace(spec, dropout=0.0),
        numerics_for(dtype, platform_of()),
    )
    return AdaptedDual(
        base, Encoders(module, base.processor, base.tokenizer), lora, located, spec
    )
