"""From names to files: aliases, local paths, the hub and its refusals. No test here reaches a
network."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file

from nalora_jax.common.downloads import PackageFile
from nalora_jax.errors import NaloraError
from nalora_jax.weights import hub
from nalora_jax.weights.hub import Alias, resolve_encoder, resolve_source


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    save_file({"x": np.ones(1, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def use_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """``use_hub(cached=..., online=...)``, folders or errors, replaces the hub's client; returns
    its calls' arguments.

    Until then the hub cannot be reached and has nothing cached.
    """

    def replace(*, cached: Any = None, online: Any = None) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def snapshot_download(
            repository: str, *, local_files_only: bool = False, **options: Any
        ) -> str:
            calls.append({"repository": repository, "local": local_files_only, **options})
            answer = cached if local_files_only else online
            if answer is None:
                raise errors.LocalEntryNotFoundError("not cached")
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    replace(online=OSError("Name or service not known"))
    return replace


def test_an_alias_is_the_hub_s_model_and_only_without_the_hub_its_package(
    use_hub, tmp_path, monkeypatch, caplog
):
    package = PackageFile(
        "tiny-package", "1.0", "0" * 64, "tiny_package/model.gguf", "MIT", "0" * 64
    )
    monkeypatch.setattr(hub, "MODEL_ALIASES", {"tiny": Alias("owner/tiny", package)})
    monkeypatch.setattr(hub.downloads, "fetch_file", {package: tmp_path / "model.gguf"}.__getitem__)
    file = "pypi:tiny-package==1.0/model.gguf"
    found = resolve_source("tiny")
    assert found == hub.ResolvedSource("gguf", tmp_path / "model.gguf", file, copy_of="owner/tiny")
    assert (
        "package mirror (model.gguf) instead of the hub: Name or service not known" in caplog.text
    )
    folder = model_folder(tmp_path / "snapshot")
    calls = use_hub(online=folder)
    assert resolve_source(file) == found  # the package's file has a name of its own
    assert calls == []
    assert hub.alias_of(file) == hub.alias_of("tiny") == hub.MODEL_ALIASES["tiny"]
    # A fetched package does not win over a hub that is reachable, and the hub's own cache needs no
    # network.
    assert resolve_source("tiny") == hub.ResolvedSource("hf", folder, "owner/tiny")
    calls = use_hub(cached=folder)
    assert resolve_source("tiny").kind == "hf"
    assert all(call["local"] for call in calls)
    with pytest.raises(
        NaloraError, match=rf"expected one of {re.escape(file)}, found another package"
    ):
        resolve_source(file.replace("1.0", "2.0"))

    def fetch(part: PackageFile) -> Any:
        raise NaloraError(
            f"package {part.package}", expected="pip to download it", found="no network"
        )

    use_hub(online=OSError("Name or service not known"))
    monkeypatch.setattr(hub.downloads, "fetch_file", fetch)
    both = r"tiny: .*Name or service not known.*package tiny-package.*local folder"
    with pytest.raises(NaloraError, match=both):
        resolve_source("tiny")


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors"])
def test_an_incomplete_snapshot_does_not_count(use_hub, tmp_path, missing):
    folder, whole = model_folder(tmp_path / "part"), model_folder(tmp_path / "whole")
    (folder / missing).unlink()
    use_hub(cached=folder, online=whole)
    assert resolve_source("owner/name").path == whole


def test_what_is_asked_of_the_hub(use_hub, tmp_path):
    calls = use_hub(online=model_folder(tmp_path))
    assert resolve_source("owner/name") == hub.ResolvedSource("hf", tmp_path, "owner/name")
    assert calls[-1]["repository"] == "owner/name"
    assert {"config.json", "*.safetensors", "tokenizer.json"} <= set(calls[-1]["allow_patterns"])
    assert not any(pattern.endswith(".bin") for pattern in calls[-1]["allow_patterns"])

    (tmp_path / "model.Q8_0.gguf").write_bytes(b"GGUF")
    calls = use_hub(online=tmp_path)
    found = resolve_source("owner/name/model.Q8_0.gguf")
    assert (found.kind, found.path) == ("gguf", tmp_path / "model.Q8_0.gguf")
    assert calls[-1]["allow_patterns"] == ["model.Q8_0.gguf"]
    with pytest.raises(NaloraError, match=r"found none of that name"):
        resolve_source("owner/name/missing.gguf")


def denied(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    """An answer of the hub, as its client raises it."""
    return kind("denied", response=SimpleNamespace(headers={}, request=None, status_code=status))


NOT_CACHED = errors.LocalEntryNotFoundError("and cannot be downloaded")
NOT_CACHED.__cause__ = denied(
    errors.HfHubHTTPError, 403
)  # a token without access to gated repositories


@pytest.mark.parametrize(
    ("error", "token", "match"),
    [
        (
            errors.LocalEntryNotFoundError("no connection\nmore"),
            None,
            "no connection; check the network",
        ),
        (
            errors.HFValidationError("must use alphanumeric chars"),
            None,
            "hub id like owner.*alphanumeric",
        ),
        (OSError(28, "No space left on device"), None, "No space left on device"),
        (
            denied(errors.GatedRepoError, 401),
            None,
            "gated .* token none; accept its .*HF_TOKEN on every host",
        ),
        (
            denied(errors.GatedRepoError, 403),
            "hf_x",
            "gated .* whose account has no access; accept",
        ),
        (NOT_CACHED, "hf_x", r"a gated repository, and as token one that the hub refuses \(403\)"),
        (
            denied(errors.RepositoryNotFoundError, 401),
            None,
            "none of that name, or a private one, .*; check",
        ),
    ],
)
def test_what_the_hub_refuses(use_hub, monkeypatch, error, token, match):
    use_hub(online=error)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    for find in (resolve_source, resolve_encoder):
        with pytest.raises(NaloraError, match=f"owner/name: .*{match}"):
            find("owner/name")


def test_a_hub_that_is_switched_off_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NaloraError, match="switched off by HF_HUB_OFFLINE"):
        resolve_source("owner/name")


def test_local_folders_and_files(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "hf")
    assert resolve_source(str(folder)) == hub.ResolvedSource("hf", folder, str(folder))
    file = tmp_path / "one" / "m.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    assert resolve_source(str(file.parent)).path == file
    with pytest.raises(NaloraError, match="folder of an image or text encoder, found m.gguf"):
        resolve_encoder(str(file))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/one/m.gguf").path == file
    monkeypatch.chdir(tmp_path)
    assert resolve_source("one/m.gguf").path == Path(
        "one/m.gguf"
    )  # a path, though it looks like a hub id


ALIASES = "aliases: smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("files", "source", "match"),
    [
        ([], ".", "expected config.json with safetensors files, or one .gguf file, found neither"),
        (["a.gguf", "b.gguf"], ".", "found a.gguf, b.gguf; give one of the files"),
        (["m.bin"], "m.bin", "found a pickle, which can run any code"),
        (["adapter_config.json"], ".", "a base model, found an adapter, .*train it with --adapter"),
        (["m.safetensors"], "m.safetensors", "the folder of a model, found one of its files"),
        ([], "~/nothing", "expected a model folder or a .gguf file, found nothing of that name"),
        *(([], name, ALIASES) for name in ("smollm", "", "a/b/c/d", "x" * 300)),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, monkeypatch, files, source, match):
    monkeypatch.chdir(tmp_path)
    for name in files:
        Path(name).write_bytes(b"GGUF")
    with pytest.raises(NaloraError, match=match):
        resolve_source(source)
