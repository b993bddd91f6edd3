"""Tokenized examples on disk: made once per data set, tokenizer and options, then memory-mapped."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_jax.config import DataConfig
from nalora_jax.data.chat import render
from nalora_jax.data.forms import IMAGES
from nalora_jax.data.packing import permutation
from nalora_jax.data.sources import Source, require_some
from nalora_jax.data.tokenize import Example, fit, tokenize
from nalora_jax.downloads import cache_dir
from nalora_jax.errors import NaloraError
from nalora_jax.files import find_damage, write_array, write_digests
from nalora_jax.image_tokens import ImageTokens
from nalora_jax.notes import counting

if TYPE_CHECKING:
    from nalora_jax.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
# Raised when the same records and tokenizer would give other tokens.
_FORMAT = 4
# Records read, rendered and tokenized together: enough to keep every core busy, little to hold in memory.
_CHUNK = 2048
# Options that change tokens, besides the split and the limit.
_OPTIONS = ("max_length", "too_long", "loss_on", "chat", "prompt_field", "completion_field", "messages_field")


@dataclass(frozen=True)
class Counts:
    """What became of the records."""

    # Examples kept.
    examples: int
    # Records left out, and examples shortened, because they were longer than a row.
    dropped: int
    truncated: int
    # Tokens kept, and those of them that count in the loss.
    tokens: int
    targets: int
    # Tokens of the longest record before anything was cut.
    longest: int


@dataclass(frozen=True)
class TokenStore:
    """Examples, one after another.

    Example (two examples of 3 and 2 tokens):
      tokens [5 9 0 8 0]   answer [0 0 1 0 1]   offsets [0 3 5]
    """

    # Ids of all examples, int32 [tokens], memory-mapped.
    tokens: np.ndarray
    # 1 where a token counts in the loss, uint8 [tokens], memory-mapped.
    answer: np.ndarray
    # Where each example begins, and the end, int64 [examples + 1].
    offsets: np.ndarray
    # The source's record of each example, int64 [examples].
    records: np.ndarray
    counts: Counts
    # sha256 of all of the above: equal on every host that reads the same data.
    fingerprint: str

    @property
    def lengths(self) -> np.ndarray:
        """Row positions of each example: one less than its tokens, as the last one is only a target."""
        return np.diff(self.offsets) - 1


def open_store(source: Source, config: DataConfig, tokenizer: Tokenizer, seed: int, cache: Path | None) -> TokenStore:
    """The tokens of ``source``, from the cache or tokenized now.

    Args:
      source: the records.
      config: how they are rendered, and how many at most (``train_limit``: the first of the seed's shuffle).
      tokenizer: of the model.
      seed: of the run; matters only where there is a limit.
      cache: folder of the cache; `downloads.cache_dir` by default.

    Raises:
      NaloraError: a record is broken, too long where that is an error, or without targets; nothing is left, or less
        than half; the disk is full.
    """
    key = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "tokenizer": _tokenizer_fingerprint(tokenizer),
        "options": {name: getattr(config, name) for name in _OPTIONS},
        "limit": [config.train_limit, seed] if config.train_limit else None,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder = (cache or cache_dir()) / "tokens" / name
    if not _whole(folder):
        require_some(source)
        indices = _selection(len(source), config.train_limit, seed)
        try:
            _build(folder, source, indices, config, tokenizer)
        except OSError as error:
            raise NaloraError(
                str(folder),
                expected="room for the tokenized data",
                found=error.strerror or error,
                remedy="free space, or set NALORA_CACHE to another folder",
            ) from error
    store = _load(folder)
    report_dropped(source.name, store.counts, config)
    return store


def report_dropped(name: str, counts: Counts, config: DataConfig) -> None:
    """Says how many records were left out as too long; refuses where those are more than half.

    A model that learns from the short half of a data set has learned something else than its user meant.
    """
    if not counts.dropped:
        return
    total, enough = counts.examples + counts.dropped, counts.longest - 1
    share = f"{counts.dropped / total:.0%}"
    found = f"{counts.dropped} of {total} records ({share}), longer than --data.max-length {config.max_length}"
    if 2 * counts.dropped > total:
        raise NaloraError(
            name,
            expected="records most of which fit",
            found=found,
            remedy=f"--data.max-length {enough} keeps all, --data.too-long truncate shortens them",
        )
    _LOG.warning(
        "%s: left out %s; --data.max-length %d keeps all, --data.too-long truncate shortens them", name, found, enough
    )


def _selection(size: int, limit: int, seed: int) -> np.ndarray:
    """Indices of the records to use, in the source's order."""
    return np.arange(size) if not 0 < limit < size else np.sort(permutation(size, seed)[:limit])


def _examples(
    source: Source, indices: np.ndarray, config: DataConfig, tokenizer: Tokenizer
) -> Iterator[tuple[int, Example]]:
    """Records' indices and their tokens, not yet cut."""
    with counting("tokenizing", len(indices)) as done:
        for start in range(0, len(indices), _CHUNK):
            chunk = indices[start : start + _CHUNK].tolist()
            records = source.read(chunk)
            pairs = zip(chunk, records, strict=True)
            texts = [render(record, config, tokenizer, source.where(index)) for index, record in pairs]
            for index, record, example in zip(chunk, records, tokenize(texts, tokenizer), strict=True):
                _check(example, config, source.where(index))
                if tokenizer.images is not None:
                    _check_images(example, tokenizer.images, len(record.get(IMAGES, ())), source.where(index))
                yield index, example
            done(len(chunk))


def _check(example: Example, config: DataConfig, where: str) -> None:
    if not example.has_target:
        raise NaloraError(
            where,
            expected="a token to learn",
            found=f"none in {len(example.ids)} tokens",
            remedy="remove the record, or see --data.loss-on",
        )
    if len(example.ids) > config.max_length + 1 and config.too_long == "error":
        raise NaloraError(
            where,
            expected=f"at most --data.max-length {config.max_length} tokens and the one after them",
            found=f"{len(example.ids)} tokens",
            remedy="raise --data.max-length, or choose --data.too-long drop or truncate",
        )


def _check_images(example: Example, tokens: ImageTokens, count: int, where: str) -> None:
    """As many image tokens as the record's images have: a template may have dropped or doubled one."""
    found = int(np.sum(example.ids == tokens.token_id))
    if found != count * tokens.count:
        raise NaloraError(
            where,
            expected=f"{count} images of {tokens.count} tokens {tokens.token!r}",
            found=f"{found} such tokens",
            remedy="the model's chat template must write one placeholder for every image",
        )


def _build(folder: Path, source: Source, indices: np.ndarray, config: DataConfig, tokenizer: Tokenizer) -> None:
    """Writes the store into a folder of its own, then renames it: a half-written one never has the final name."""
    began = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix="incomplete-"))
    try:
        counts = _write(scratch, _examples(source, indices, config, tokenizer), config, tokenizer.bos_id)
        if not counts.examples:
            raise NaloraError(
                source.name,
                expected=f"records of at most {config.max_length} tokens",
                found=f"{counts.dropped} records, all of them longer",
                remedy=f"--data.max-length {counts.longest - 1} keeps all, --data.too-long truncate shortens them",
            )
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "meta.json").exists():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _LOG.info("tokenized %s: %d examples in %.1f s", source.name, counts.examples, time.perf_counter() - began)


def _write(scratch: Path, examples: Iterator[tuple[int, Example]], config: DataConfig, bos_id: int | None) -> Counts:
    """Streams examples into the files of a store; memory does not grow with them, but for 16 bytes each."""
    offsets, records, digest = [0], [], hashlib.sha256()
    dropped = truncated = targets = longest = 0
    with (scratch / "tokens.bin").open("wb") as tokens, (scratch / "answer.bin").open("wb") as answer:
        for record, example in examples:
            size = len(example.ids)
            longest = max(longest, size)
            if size > config.max_length + 1:
                if config.too_long == "drop":
                    dropped += 1
                    continue
                truncated += 1
                example = fit(example, config.max_length, bos_id)
            digest.update(len(example.ids).to_bytes(8, "little"))
            for file, part in ((tokens, example.ids.astype("<i4")), (answer, example.answer.astype(np.uint8))):
                file.write(part.tobytes())
                digest.update(part.tobytes())
            offsets.append(offsets[-1] + len(example.ids))
            records.append(record)
            targets += int(example.answer[1:].sum())
    write_array(scratch / "offsets.npy", np.array(offsets, np.int64))
    write_array(scratch / "records.npy", np.array(records, np.int64))
    counts = Counts(len(offsets) - 1, dropped, truncated, offsets[-1], targets, longest)
    meta = {"fingerprint": digest.hexdigest(), "counts": asdict(counts)}
    (scratch / "meta.json").write_text(json.dumps(meta))
    write_digests(scratch)
    return counts


def _whole(folder: Path) -> bool:
    """Whether the store is there and is what was written; one that is not is removed, to be made again."""
    if not folder.exists():
        return False
    try:
        damage = find_damage(folder)
    except OSError:
        damage = "it has no digests"
    if damage is None:
        return True
    _LOG.warning("the cached tokens in %s are damaged (%s): making them again", folder, damage)
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _load(folder: Path) -> TokenStore:
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    return TokenStore(
        tokens=np.memmap(folder / "tokens.bin", "<i4", mode="r"),
        answer=np.memmap(folder / "answer.bin", np.uint8, mode="r"),
        offsets=np.load(folder / "offsets.npy"),
        records=np.load(folder / "records.npy"),
        counts=Counts(**meta["counts"]),
        fingerprint=meta["fingerprint"],
    )


def _tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Changes with anything that could change the ids of a text."""
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.add_bos)
    templates = (tokenizer.chat_template, tokenizer.tool_template)
    special = sorted((tokenizer.special_tokens or {}).items())
    images = "" if tokenizer.images is None else str(tokenizer.images)
    return hashlib.sha256(f"{tokenizer.backend.to_str()}{ids}{templates}{special}{images}".encode()).hexdigest()
