from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
import transformers
from jax.sharding import PartitionSpec as P

from nalora_jax.config import MeshConfig
from nalora_jax.layout.distributed import PARAM_RULES, make_mesh, shardings
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families import supported
from nalora_jax.models.stacks import param_shapes

# Defaults of transformers that no model has: 96 heads do not divide the width.
SIZES = {"glm4_moe": {"head_dim": 128}}


@pytest.mark.parametrize("family", supported())
def test_every_weight_of_every_family_has_a_rule_and_every_large_one_is_split(family):
    config = ModelConfig.from_hf(
        transformers.AutoConfig.for_model(family, **SIZES.get(family, {})).to_dict()
    )
    shapes = {
        path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in param_shapes(config).items()
    }
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    placed = shardings(shapes, mesh, PARAM_RULES)
    whole = [path for path, sharding in placed.items() if sharding.spec == P()]
    assert all(math.prod(shapes[path].shape[1:]) < 2**16 for path in whole), whole  # values per layer
