"""Tokenized examples on disk, written once per data set, tokenizer and options, and memory-mapped.

Examples are stored uncut. `cut_store` applies the row length and ``too_long`` later, so
that changing either does not tokenize again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_jax.common.digests import digest_of, find_damage, json_digest, write_digests
from nalora_jax.common.downloads import cache_dir
from nalora_jax.common.files import write_array
from nalora_jax.common.locks import scratch_folder
from nalora_jax.config import DataConfig
from nalora_jax.data.chat_text import Rendered, render_record
from nalora_jax.data.forms import IMAGES
from nalora_jax.data.packing import permutation
from nalora_jax.data.source import Record, Source, require_some, share_text
from nalora_jax.data.tokenize import Example, fit_example, rows_of, tokenize_texts
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.chat_templates import ImageTokens
    from nalora_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

UNLIMITED = 2**24  # context of a model that is not known
# Increase it when the same records and tokenizer would produce other tokens.
_FORMAT = 5
# Options that change tokens, in addition to the split and the limit.
_OPTIONS = ("loss_on", "chat", "prompt_field", "completion_field", "messages_field")


@dataclass(frozen=True)
class Counts:
    """Numbers of kept, dropped and truncated records, and of their tokens."""

    # Examples in the store.
    examples: int
    # Tokens in the store, and the loss tokens among them.
    tokens: int
    targets: int
    # Records left out, and examples shortened, because they were longer than a row.
    dropped: int = 0
    truncated: int = 0
    # Records divided into several examples, because they were longer than a row.
    split: int = 0


# Yields the records at indices of a source: their indices and examples, not yet cut.
Examples = Callable[[Source, np.ndarray], Iterator[tuple[int, Example]]]


@dataclass(frozen=True)
class TokenStore:
    """Concatenated tokens of all examples.

    Example (two examples of 3 and 2 tokens):
      tokens [5 9 0 8 0]   answer [0 0 1 0 1]   offsets [0 3 5]
    """

    # Ids of all examples, int32 [tokens], memory-mapped.
    tokens: np.ndarray
    # 1 for loss tokens, uint8 [tokens], memory-mapped.
    answer: np.ndarray
    # Start of each example, and the total, int64 [examples + 1].
    offsets: np.ndarray
    # The source's record of each example, int64 [examples].
    records: np.ndarray
    counts: Counts
    # sha256 of the arrays: equal on every host that reads the same data.
    fingerprint: str
    folder: Path

    def lengths(self, group: int = 1) -> np.ndarray:
        """Returns the positions that every ``group`` consecutive examples take in a row, int
        ``[examples / group]``.

        An example takes one position less than it has tokens, because its last token is only a
        target.
        """
        return (np.diff(self.offsets) - 1).reshape(-1, group).sum(axis=1)


def open_store(
    source: Source,
    config: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    examples: Examples,
    **options: Any,
) -> TokenStore:
    """Returns the tokens of ``source``, uncut, from the cache or tokenized now.

    Args:
      source: the records.
      config: rendering options and ``train_limit`` (the first records of the seed's shuffle).
      tokenizer: tokenizer of the model.
      seed: seed of the run; has an effect only with a limit.
      examples: yields the examples of records; several of one record share a row.
      options: settings that change these examples.

    Raises:
      NaloraError: a record is broken or has no loss tokens, or the disk is full.
    """
    key = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "tokenizer": _tokenizer_fingerprint(tokenizer),
        "options": {name: getattr(config, name) for name in _OPTIONS},
        "limit": [config.train_limit, seed] if config.train_limit else None,
    }
    if options:
        key["group"] = options
    name = json_digest(key, sort_keys=True)[:32]
    folder = cache_dir() / "tokens" / name
    if not is_whole(folder):
        require_some(source)
        indices = np.sort(permutation(len(source), seed)[: config.train_limit or None])
        began = time.perf_counter()
        write_store(folder, examples(source, indices))
        seconds = time.perf_counter() - began
        log.info(
            "tokenized %s: %d examples in %.1f s", source.name, len(indices), seconds
        )
    return load_store(folder)


def text_examples(
    source: Source, indices: np.ndarray, config: DataConfig, tokenizer: Tokenizer
) -> Iterator[tuple[int, Example]]:
    """Yields the indices of records of text and their tokens, not yet cut."""

    def render(record: Record, where: str) -> tuple[list[Rendered], int]:
        """Returns the text of a record, and the number of its images."""
        text = render_record(record, config, tokenizer, where)
        return [text], len(record.get(IMAGES, ()))

    for index, _, (example,), images in tokenize_texts(
        source, indices, render, tokenizer, config
    ):
        if not example.has_target:
            raise NaloraError(
                source.where(index),
                expected="a token to learn",
                found=f"none in {len(example.ids)} tokens",
                remedy="remove the record, or see --data.loss-on",
            )
        if tokenizer.images is not None:
            _check_images(example, images, tokenizer.images, source.where(index))
        yield index, example


def _check_images(
    example: Example, images: int, tokens: ImageTokens, where: str
) -> None:
    """Raises a NaloraError unless an example has the tokens of its number of ``images``.

    A template may have dropped or doubled the placeholder of an image.
    """
    count = int(np.sum(example.ids == tokens.token_id))
    # Of images whose tokens depend on their size, `SizedImageTokens.expanded` checks the number.
    if tokens.sized or count == images * tokens.count:
        return
    raise NaloraError(
        where,
        expected=f"{images} images of {tokens.count} tokens {tokens.token!r}",
        found=f"{count} such tokens",
        remedy="the model's chat template must write one placeholder for every image",
    )


def write_store(
    folder: Path, examples: Iterator[tuple[int, Example]], **cut: int
) -> None:
    """Writes a store and renames it when it is complete: a partial store never has the final name.

    Args:
      folder: the store's folder.
      examples: index of a record in its source, and its tokens.
      **cut: ``dropped``, ``truncated`` and ``split`` of `Counts`.

    Raises:
      NaloraError: the disk is full; errors of ``examples`` pass through.
    """
    offsets = [0]
    records = []
    digest = hashlib.sha256()
    targets = 0
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder.parent, ".incomplete") as scratch:
            with (
                (scratch / "tokens.bin").open("wb") as tokens,
                (scratch / "answer.bin").open("wb") as answer,
            ):
                # memory grows by only 16 bytes per example
                for record, example in examples:
                    size = len(example.ids)
                    ids = example.ids.astype("<i4").tobytes()
                    mask = example.answer.astype(np.uint8).tobytes()
                    tokens.write(ids)
                    answer.write(mask)
                    digest.update(size.to_bytes(8, "little") + ids + mask)
                    offsets.append(offsets[-1] + size)
                    records.append(record)
                    targets += int(np.count_nonzero(example.answer[1:]))
            write_array(scratch / "offsets.npy", np.array(offsets, np.int64))
            write_array(scratch / "records.npy", np.array(records, np.int64))
            counts = Counts(len(records), offsets[-1], targets, **cut)
            meta = {"fingerprint": digest.hexdigest(), "counts": asdict(counts)}
            (scratch / "meta.json").write_text(json.dumps(meta))
            write_digests(scratch)
            try:
                scratch.rename(folder)
            except OSError:
                if not (folder / "meta.json").exists():
                    raise  # otherwise another process was first, with the same content
    except OSError as error:
        actual = error.strerror or error
        raise NaloraError(
            str(folder),
            expected="room for the tokenized data",
            found=actual,
            remedy="free space, or set NALORA_CACHE to another folder",
        ) from error


def is_whole(folder: Path) -> bool:
    """Returns True if the store exists and is undamaged; removes a damaged store."""
    if not folder.exists():
        return False
    try:
        damage = find_damage(folder)
    except OSError:
        damage = "it has no digests"
    if damage is None:
        return True
    log.warning(
        "the cached tokens in %s are damaged (%s): making them again", folder, damage
    )
    shutil.rmtree(folder, ignore_errors=True)
    return False


def load_store(folder: Path) -> TokenStore:
    """Returns the store in ``folder`` with memory-mapped arrays."""
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    counts = meta["counts"]
    counts.pop("longest", None)  # in early stores
    return TokenStore(
        tokens=np.memmap(folder / "tokens.bin", "<i4", mode="r"),
        answer=np.memmap(folder / "answer.bin", np.uint8, mode="r"),
        offsets=np.load(folder / "offsets.npy"),
        records=np.load(folder / "records.npy"),
        counts=Counts(**counts),
        fingerprint=meta["fingerprint"],
        folder=folder,
    )


def _tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Returns a digest that changes with every property that could change the ids of a text."""
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.add_bos)
    templates = (tokenizer.chat_template, tokenizer.tool_template)
    special = sorted((tokenizer.special_tokens or {}).items())
    images = "" if tokenizer.images is None else str(tokenizer.images)
    return digest_of(f"{tokenizer.backend.to_str()}{ids}{templates}{special}{images}")


def cut_store(
    store: TokenStore,
    source: Source,
    config: DataConfig,
    bos_id: int | None,
    context: int = UNLIMITED,
    group: int = 1,
) -> TokenStore:
    """Returns examples of at most ``config.max_length`` positions with the loss on
    ``config.loss_last``.

    It is ``store`` itself if no example changes. Changed examples are cached next to the store.

    Args:
      store: all examples of ``source``.
      source: names records in messages.
      config: gives ``max_length``, ``too_long`` and ``loss_last``.
      bos_id: id that stays at the beginning of a truncated example.
      context: maximum tokens of a row, for advice.
      group: examples of a record. Together they have at most ``max_length`` positions; if a record
        is truncated, each has at most an equal share.

    Raises:
      NaloraError: a record is too long and ``too_long`` is an error; fewer than half of the records
        or none of them fit; an example has no loss token in its last part; the disk is full.
    """
    positions = store.lengths(group)
    long = positions > config.max_length  # of each record
    if not long.any() and not config.loss_last:
        return store
    count = int(long.sum())
    drop = config.too_long == "drop"
    if count and config.too_long == "error":
        first = int(np.argmax(long))
        where = source.where(int(store.records[group * first]))
        raise _too_long(where, int(positions[first]), config, context, group)
    if count and drop:
        _report_dropped(source.name, positions, config, context, group)
    last = f"-last-{config.loss_last:g}" if config.loss_last else ""
    folder = store.folder.with_name(
        f"{store.folder.name}-{config.max_length}-{config.too_long}{last}"
    )
    if not is_whole(folder):
        kept = np.flatnonzero(np.repeat(~(long & drop), group))  # examples
        names = {"drop": "dropped", "truncate": "truncated", "split": "split"}
        counts = {names[config.too_long]: count} if count else {}
        # The examples of a record that is too long share max_length equally.
        short = replace(config, max_length=config.max_length // group)

        def cut_examples() -> Iterator[tuple[int, Example]]:
            """Yields (record index, example) pairs, truncated or split to fit."""
            for i in kept:
                place = slice(store.offsets[i], store.offsets[i + 1])
                record = int(store.records[i])
                ids = np.asarray(store.tokens[place])
                answer = np.asarray(store.answer[place])
                example = Example(ids, answer.astype(bool))
                limits = short if long[i // group] else config
                if config.too_long != "split":
                    example = fit_example(example, limits.max_length, bos_id)
                rows = rows_of(example, limits, bos_id)
                if not rows and config.too_long != "split":
                    last_part = f"--data.loss-last {config.loss_last:g}"
                    raise NaloraError(
                        source.where(record),
                        expected=f"a token to learn in the last part ({last_part})",
                        found=f"none in {len(example.ids)} tokens",
                        remedy="raise --data.loss-last, or see --data.loss-on",
                    )
                for row in rows:
                    yield record, row

        write_store(folder, cut_examples(), **counts)
    cut = load_store(folder)
    counts_cut = replace(cut.counts, examples=cut.counts.examples // group)
    if counts_cut.split:
        text = "%s: %d records longer than a row of %d tokens are split; rows of examples: %d"
        log.info(text, source.name, count, config.max_length, counts_cut.examples)
    return replace(cut, counts=counts_cut)


def _report_dropped(
    name: str, positions: np.ndarray, config: DataConfig, context: int, group: int
) -> None:
    """Logs the number of records dropped as too long; refuses data if most are dropped.

    Training on only the short half of a data set is not the task that its user specified.
    """
    count = int(np.sum(positions > config.max_length))
    total = len(positions)
    longest = int(positions.max())
    share = share_text(count, total)
    limit = f"longer than --data.max-length {config.max_length}"
    found = f"{count} of {total} records ({share}), {limit}"
    keeps = f"--data.max-length {longest} keeps all"
    if longest > context:
        keeps = f"some are longer than the {context:,} tokens that a row may have with this model"
    ways = "truncate"
    if group == 1:
        ways = "split or truncate"
    remedy = f"{keeps}, --data.too-long {ways} shortens them"
    if 2 * count > total:
        raise NaloraError(
            name, expected="records most of which fit", found=found, remedy=remedy
        )
    log.warning("%s: left out %s; %s", name, found, remedy)


def _too_long(
    where: str, length: int, config: DataConfig, context: int, group: int
) -> NaloraError:
    """Returns the error for a record with ``length`` positions, which does not fit a row."""
    ways = "drop, split or truncate"
    tokens = f"{length + 1} tokens"
    counted = "and the one after them"
    if group > 1:
        ways = "drop or truncate"
        tokens = f"{length} tokens"
        counted = "in both answers with their prompts"
    remedy = f"raise --data.max-length, or choose --data.too-long {ways}"
    if length > context:
        remedy = f"choose --data.too-long {ways}: the model has {context:,} positions"
    expected = f"at most --data.max-length {config.max_length} tokens {counted}"
    return NaloraError(where, expected=expected, found=tokens, remedy=remedy)
