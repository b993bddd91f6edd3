"""The base that an exported adapter names, for other tools and for this library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax

from nalora_jax.config import LoRAConfig, LoRARule, RunConfig
from nalora_jax.models.adapters import adapter_spec, init_lora
from nalora_jax.train.cards import base_card
from nalora_jax.train.kinds.text import write_adapter
from nalora_jax.train.located import locate
from nalora_jax.weights.base import load_model
from nalora_jax.weights.card import render_card
from nalora_jax.weights.hub import ALIASES
from tests import tiny

ALIAS = ALIASES["smollm2-135m-instruct"]


def test_an_adapter_of_a_copy_names_the_original_and_is_loaded_on_the_copy(tmp_path: Path) -> None:
    loaded = load_model(str(tiny.make_model(tmp_path / "model")), dtype="float32")
    assert loaded.origin is not None
    origin = replace(loaded.origin, name=ALIAS.mirror, copy_of=ALIAS.hub_id)
    loaded = replace(loaded, source=ALIAS.mirror, origin=origin)
    spec = adapter_spec(RunConfig(lora=LoRAConfig((LoRARule("gate_proj", 2),))), loaded.config)
    write_adapter(tmp_path / "adapter", loaded, init_lora(loaded.config, spec, jax.random.key(0)), spec)
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    assert settings["base_model_name_or_path"] == ALIAS.hub_id
    assert locate(path.parent).base == ALIAS.mirror
    path.write_text(json.dumps(settings | {"base_model_name_or_path": "owner/other"}))
    assert locate(path.parent).base == "owner/other"
    card = render_card(base_card("adapter", ALIAS.mirror, loaded, spec))
    assert f"base_model: {ALIAS.hub_id}" in card
    assert f"loads it by the name `{ALIAS.mirror}`" in card
