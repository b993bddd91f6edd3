"""A run's inputs, judged before its model is loaded: data, splits, rules."""

from __future__ import annotations

from nalora_jax.config import DataConfig, LoRAConfig
from nalora_jax.data.sources import Source, check_disjoint, open_source
from nalora_jax.models.config import projection_shapes
from nalora_jax.nn.low_rank import AdapterSpec, resolve
from nalora_jax.weights.hub import ResolvedSource
from nalora_jax.weights.model import read_config


def check_data(data: DataConfig) -> tuple[Source, Source]:
    """The records to train on and those held out; the first of each is read.

    Raises:
      NaloraError: no such data set, file or split, nothing in it, a first record that is none, or shared records.
    """
    held_out = open_source(data, data.eval_split)
    train = open_source(data, data.train_split)
    check_disjoint(train, held_out)
    for source in (train, held_out):
        source.read([0])
    return train, held_out


def check_rules(lora: LoRAConfig, model: ResolvedSource) -> AdapterSpec:
    """The adapters that the rules mean on a model, of which the description alone is read.

    Raises:
      NaloraError: a rule matches nothing, or asks for an impossible rank.
    """
    config = read_config(model)
    return resolve(lora, projection_shapes(config), config.n_layers)
