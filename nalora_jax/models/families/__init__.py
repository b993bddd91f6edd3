"""The families of models that this library has: one record per ``model_type``, in modules of
related families.

Importing this package enters them into the tables of `nalora_jax.models.family`.
"""

from __future__ import annotations

from typing import Any

from nalora_jax.common.fields import Fields
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families import dense, gemma, hybrids, latent_families, mixtures
from nalora_jax.models.family import BUILT_IN, MULTIMODAL, Family
from nalora_jax.models.family import register_family as register_family
from nalora_jax.models.family import supported as supported
from nalora_jax.models.readers import base_values
from nalora_jax.models.tensor_rows import TensorRow as TensorRow
from nalora_jax.models.vision.families import VISION_FAMILIES
from nalora_jax.models.vision.patch_families import PATCH_FAMILIES

GROUPS = (dense, mixtures, hybrids, gemma, latent_families)
for _group in GROUPS:
    BUILT_IN.update(
        {
            value.name: value
            for value in vars(_group).values()
            if isinstance(value, Family)
        }
    )
MULTIMODAL.update(VISION_FAMILIES)
MULTIMODAL.update(PATCH_FAMILIES)


def base_config(f: Fields, name: str, **features: Any) -> ModelConfig:
    """Returns the config with the fields that all families share, updated with ``features``.

    The features are fields of `ModelConfig`, and ``norm_topk``: False if the weights of a token's
    experts do not have to sum to 1.
    """
    normalize = features.pop("norm_topk", True)
    if features.get("n_experts") and "ffn" not in features:
        features["ffn"] = mixtures.plain_mixture(normalize)
    return ModelConfig(**base_values(f, name, features))
