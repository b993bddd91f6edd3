"""`nalora push` against a hub that is no hub: a recorder in place of its client, and a server that refuses."""

from __future__ import annotations

import fnmatch
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import huggingface_hub
import jax
import pytest

from nalora_jax.__main__ import main
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import AdapterSpec, resolve
from nalora_jax.tokenizer import Tokenizer
from nalora_jax.weights.card import Card, write_card
from nalora_jax.weights.merge import write_merged
from nalora_jax.weights.peft import export_adapter, import_adapter
from tests import tiny
from tests.param_trees import init_params

CONFIG = ModelConfig.from_hf(tiny.HF)
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def adapter(tmp_path):
    """The adapter of a run's folder, beside files that belong to nobody else."""
    folder = tmp_path / "run" / "adapter"
    spec = resolve(LoRAConfig(rules=(LoRARule("ffn", 2),)), projection_shapes(CONFIG), 2)
    lora = jax.device_get(init_lora(CONFIG, spec, jax.random.key(0)))
    export_adapter(lora, spec, CONFIG, folder, base_model_name=BASE)
    write_card(folder, Card("adapter", BASE, spec, license="Apache-2.0"))
    (folder.parent / "metrics.jsonl").write_text("{}\n")
    return folder


@pytest.fixture
def hub(monkeypatch):
    """What the hub was told."""
    told = SimpleNamespace(repositories=[], commits=[])

    class Api:
        def __init__(self, **options):
            del options

        def create_repo(self, repo_id, **options):
            told.repositories.append((repo_id, options))

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
            files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            sent = {
                n: c for n, c in files.items() if any(fnmatch.fnmatch(n, one) for one in allow_patterns)
            }
            told.commits.append((repo_id, sent, commit_message))
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    return told


def test_a_run_s_adapter_goes_up_with_its_card_and_nothing_else(adapter, hub, capsys):
    (adapter / "notes.bin").write_bytes(b"x")
    assert main(["push", str(adapter.parent), "--repo", "me/mine", "--private"]) == 0
    assert capsys.readouterr().out == "https://hub/me/mine/commit/1\n"
    assert hub.repositories == [("me/mine", {"private": True, "exist_ok": True})]
    ((repository, files, message),) = hub.commits
    assert (repository, message) == ("me/mine", "Adapter by nalora_jax")
    assert files == {
        name: (adapter / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md")
    }


def test_another_base_is_named_in_what_goes_up_and_not_here(adapter, hub, tmp_path):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert main(["push", str(adapter), "--repo", "me/mine", "--base-model", "other/base"]) == 0
    files = hub.commits[0][1]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "other/base"
    assert huggingface_hub.ModelCard(files["README.md"].decode()).data.base_model == "other/base"
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in files.items():
        (copy / name).write_bytes(content)
    import_adapter(copy, CONFIG)  # the digest does not cover the base's name


def test_a_merged_model_goes_up_whole(tmp_path, hub):
    tokenizer = Tokenizer.from_folder(tiny.make_model(tmp_path / "model"))
    params = init_params(CONFIG, jax.random.key(0))
    folder = tmp_path / "merged"
    write_merged(
        folder,
        CONFIG,
        params,
        None,
        AdapterSpec(),
        hf_config=tiny.HF,
        tokenizer=tokenizer,
        card="---\n---\n# Mine\n",
    )
    assert main(["push", str(folder), "--repo", "me/mine", "--message", "First"]) == 0
    assert set(hub.commits[0][1]) == {path.name for path in folder.iterdir()}
    assert hub.commits[0][2] == "First"


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        (lambda a: None, ["--repo", "mine"], "--repo: expected a hub id like owner/name, found 'mine'"),
        (lambda a: (a / "README.md").unlink(), [], "expected a card (README.md), found none"),
        (
            lambda a: (a / "adapter_config.json").unlink(),
            [],
            "expected the folder of a run, an adapter or a merged model",
        ),
        (
            lambda a: (a / "adapter_config.json").write_text('{"base_model_name_or_path": "/my/model"}'),
            [],
            "expected a base model on the hub, which others can load, found '/my/model'",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_before_the_hub_is_asked(
    adapter, hub, capsys, change, flags, said
):
    change(adapter)
    assert main(["push", str(adapter), *(flags or ["--repo", "me/mine"])]) == 2
    assert said in capsys.readouterr().err
    assert not hub.repositories


def test_without_a_token_it_says_how_to_get_one(adapter, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", str(adapter), "--repo", "me/mine"]) == 2
    assert (
        "token: expected one that may write to the hub, found none; log in with" in capsys.readouterr().err
    )
    assert not hub.repositories


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "a token that the hub knows"),
        (403, "a token that may write there"),
        (500, "the hub to take the files"),
    ],
)
def test_what_a_server_refuses_is_one_line(adapter, monkeypatch, capsys, status, said):
    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.dumps({"error": "not today"}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given):
            del given

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        try:
            assert main(["push", str(adapter), "--repo", "me/mine"]) == 2
        finally:
            server.shutdown()
            thread.join()
    error = capsys.readouterr().err
    assert f"error: me/mine: expected {said}, found {status}: " in error
    assert "hf_secret" not in error
