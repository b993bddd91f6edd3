"""The families of models that this library has: one record per ``model_type``, in modules of related families.

Importing this package enters them into the tables of `nalora_jax.models.family`.
"""

from __future__ import annotations

from nalora_jax.models.families import dense, gemma, hybrids, mixtures
from nalora_jax.models.family import BUILT_IN, MULTIMODAL
from nalora_jax.models.family import TensorRow as TensorRow
from nalora_jax.models.family import register_family as register_family
from nalora_jax.models.family import supported as supported
from nalora_jax.models.readers import base_config as base_config
from nalora_jax.models.vision.families import SIGHTS

_GROUPS = (dense, mixtures, hybrids, gemma)
BUILT_IN.update({family.name: family for group in _GROUPS for family in group.FAMILIES})
MULTIMODAL.update(SIGHTS)
