"""Which base, adapter and run a user's words mean, and which base an exported adapter names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from nalora_jax.config import LoRAConfig, LoRARule, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.text import write_adapter
from nalora_jax.loading.located import Located, locate, run_config
from nalora_jax.models.adapters import adapter_spec, init_lora
from nalora_jax.weights.base import load_model
from nalora_jax.weights.card import base_card, render_card
from nalora_jax.weights.hub import MODEL_ALIASES
from tests import tiny


def make_adapter(folder, **settings):
    folder.mkdir(parents=True)
    config = {"base_model_name_or_path": "owner/base"} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def run(tmp_path):
    make_adapter(tmp_path / "run" / "adapter")
    write_header(tmp_path / "run", {"model": "an-alias", "data": {"chat": True}})
    return tmp_path / "run"


def write_header(folder, config, **more):
    (folder / "metrics.jsonl").write_text(json.dumps({"run": config, **more}) + "\n")


def test_a_runs_folder_is_its_base_with_its_adapter(run, tmp_path):
    assert locate("owner/name") == Located("owner/name")
    recorded = {"model": "an-alias", "data": {"chat": True}}
    for name in (str(run), run / "adapter"):
        assert locate(name) == Located("an-alias", run / "adapter", recorded)
        assert locate("owner/other", name) == Located("owner/other", run / "adapter", recorded)
    theirs = make_adapter(tmp_path / "theirs")
    assert locate(theirs) == Located("owner/base", theirs, {})
    # The base is the very file that the run noted: the alias may mean one with other numbers today.
    write_header(run, {"model": "an-alias"}, base={"name": "pypi:p==1/m.gguf"})
    assert locate(run).base == "pypi:p==1/m.gguf"


REFUSED = {
    "two adapters": (lambda run: locate(run, run), "--adapter: expected a base model to put it on"),
    "no adapter": (
        lambda run: locate("owner/base", run.parent / "nothing"),
        r"expected a folder with adapter_config\.json, or a run's folder",
    ),
    "nothing exported yet": (
        lambda run: (run / "adapter" / "adapter_config.json").unlink() or locate(run),
        "expected a run that exported its adapter, found none yet; finish the run",
    ),
    "no base": (
        lambda run: locate(make_adapter(run.parent / "theirs", base_model_name_or_path=None)),
        "base_model_name_or_path: expected a model.*give the base model itself",
    ),
    "edited settings": (
        lambda run: write_header(run, {"model": "an-alias", "steps": "ten"}) or run_config(run),
        r"metrics\.jsonl: line 1: run: steps: expected a whole number, found 'ten'; .*restore that line",
    ),
}


@pytest.mark.parametrize(("read", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_located_is_named(run, read, said):
    with pytest.raises(NaloraError, match=said):
        read(run)


ALIAS = MODEL_ALIASES["smollm2-135m-instruct"]


def test_an_adapter_of_a_copy_names_the_original_and_is_loaded_on_the_copy(tmp_path: Path) -> None:
    loaded = load_model(str(tiny.make_model(tmp_path / "model")), dtype="float32")
    origin = replace(loaded.origin, name=ALIAS.mirror, copy_of=ALIAS.hub_id)
    loaded = replace(loaded, source=ALIAS.mirror, origin=origin)
    spec = adapter_spec(RunConfig(lora=LoRAConfig((LoRARule("gate_proj", 2),))), loaded.config)
    write_adapter(
        tmp_path / "adapter", loaded, init_lora(loaded.config, spec, jax.random.key(0)), spec
    )
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    assert settings["base_model_name_or_path"] == ALIAS.hub_id
    assert locate(path.parent).base == ALIAS.mirror
    path.write_text(json.dumps(settings | {"base_model_name_or_path": "owner/other"}))
    assert locate(path.parent).base == "owner/other"
    card = render_card(base_card("adapter", ALIAS.mirror, loaded, spec))
    assert f"loads it by the name `{ALIAS.mirror}`" in card
