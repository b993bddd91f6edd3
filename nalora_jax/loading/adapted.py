"""Loads a model by name with its adapter: used by every subcommand except ``train``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from nalora_jax.common.devices import TENSOR
from nalora_jax.config import config_from_dict
from nalora_jax.loading.located import Located, find_adapter, locate, run_config
from nalora_jax.mesh import distributed, sharding
from nalora_jax.mesh.distributed import platform_of
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import key_heads
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.models.vision.patch_decoder import decoder_for
from nalora_jax.ops.dispatch import numerics_for
from nalora_jax.ops.shardings import Shardings
from nalora_jax.weights.base import limit_pixels, load_model
from nalora_jax.weights.hf import ResolvedSource
from nalora_jax.weights.hub import resolve_source
from nalora_jax.weights.model_files import LoadedModel
from nalora_jax.weights.new_tokens import check_adapter, take_adapter_tokens
from nalora_jax.weights.peft_config import recorded_fact
from nalora_jax.weights.peft_import import import_adapter


@dataclass(frozen=True)
class AdaptedModel:
    """A base model, with or without an adapter, ready to run."""

    base: LoadedModel
    module: Decoder
    lora: dict[str, Any] | None  # float32 tree of the adapter
    located: Located

    @property
    def variables(self) -> dict[str, Any]:
        """Returns the variables for ``module.apply``."""
        collections = {"params": self.base.params, "lora": self.lora}
        return {name: tree for name, tree in collections.items() if tree is not None}

    @property
    def spec(self) -> AdapterSpec:
        """Returns ranks and alphas of the adapter; empty without one."""
        return self.module.adapters


def load(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    quantize: Literal["none", "int8", "nf4", "mxfp4", "run"] = "none",
    mesh: Mesh | None = None,
    resolved: ResolvedSource | None = None,
    implementation: str = "auto",
    images: bool | None = None,
) -> AdaptedModel:
    """Loads the model called ``model`` and applies its adapter.

    The arguments are documented at `locate`, `weights.load_model` and
    `nalora_jax.ops.dispatch.numerics_for`. ``images`` defaults to True if the run that trained the
    adapter used images.

    Without ``dtype`` the base has the dtype of the run that trained the adapter, otherwise
    bfloat16; with ``quantize="run"`` it is quantized as in that run. If the adapter was trained
    with added tokens, the base gets them: rows of its embedding and head, and the tokenizer in the
    adapter's folder. It also gets the RoPE scaling that the adapter was trained with. ``resolved``
    passes files that were resolved earlier.

    Raises:
      NaloraError: see `locate`, `weights.load_model`, `weights.new_tokens.take_adapter_tokens` and
        `weights.peft_import.import_adapter`; or a tensor axis of the mesh splits a head.
    """
    located = locate(model, adapter)
    run = config_from_dict(located.run)
    compute = run.compute
    # Without a run the recorded settings are the defaults, and images are not read.
    if images is None:
        images = run.vision.reads_chats
    dtype = dtype or compute.dtype
    if quantize == "run":
        quantize = compute.quantize
    quantized = None if quantize == "none" else quantize
    files = resolved or resolve_source(located.base)
    if located.adapter is not None:
        files = replace(
            files, rope_scaling=recorded_fact(located.adapter, "rope_scaling")
        )
    base = load_model(files, dtype=dtype, mesh=mesh, quantized=quantized, images=images)
    if base.processor is not None:
        base = limit_pixels(base, run.vision)
    lora = None
    spec = AdapterSpec()
    if located.adapter is not None:
        base = take_adapter_tokens(base, located.adapter, mesh)
        lora, spec = import_adapter(
            located.adapter, base.config, fingerprint=base.fingerprint
        )
    if mesh is not None:
        distributed.check_heads(
            mesh.shape[TENSOR],
            n_heads=base.config.n_heads,
            n_kv_heads=key_heads(base.config),
        )
        lora = jax.device_put(
            lora, sharding.shardings(lora, mesh, sharding.STATE_RULES)
        )
    numerics = numerics_for(dtype, platform_of(mesh), implementation)
    # Only the routing of experts needs a constraint.
    shardings = Shardings(routed=distributed.row_sharding(mesh))
    module = decoder_for(base.config, spec, numerics, shardings=shardings)
    return AdaptedModel(base, module, lora, located)


def attach_adapter(
    model: AdaptedModel, adapter: str | Path, mesh: Mesh | None = None
) -> AdaptedModel | None:
    """Returns the base of ``model`` with another adapter; None if the folder has no adapter.

    Args:
      model: a loaded model; its current adapter is left out.
      adapter: folder of a run or of a PEFT adapter.
      mesh: the mesh that ``model`` was loaded on.

    Raises:
      NaloraError: the adapter cannot be read, or belongs to another base or to other added tokens.
    """
    folder = find_adapter(Path(adapter))
    if folder is None:
        return None
    base = model.base
    lora, spec = adapter_for(base, folder)
    if mesh is not None:
        lora = jax.device_put(
            lora, sharding.shardings(lora, mesh, sharding.STATE_RULES)
        )
    # The folder of a run is the parent of its adapter.
    located = Located(model.located.base, folder, run_config(folder.parent))
    return AdaptedModel(base, model.module.clone(adapters=spec), lora, located)


def adapter_for(base: LoadedModel, folder: Path) -> tuple[dict[str, Any], AdapterSpec]:
    """Imports another adapter for a loaded model; returns its tree and its spec.

    Raises:
      NaloraError: the adapter cannot be read, or belongs to another base or to other added tokens.
    """
    check_adapter(base, folder)
    return import_adapter(folder, base.config, fingerprint=base.fingerprint)
