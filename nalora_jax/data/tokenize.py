"""Renders records in batches and converts their texts to token ids with a loss mask.

An error names up to ten broken records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import tokenizers

from nalora_jax.common.notes import count_progress
from nalora_jax.config import DataConfig
from nalora_jax.data.chat_templates import EndlessTemplateError
from nalora_jax.data.chat_text import MissingFieldError, Rendered
from nalora_jax.data.forms import form_of
from nalora_jax.data.source import Record, Source
from nalora_jax.errors import ListedError, NaloraError, shorten

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer

T = TypeVar("T")

# Records read, rendered and tokenized together, and their characters: enough to use every core with
# little memory.
_CHUNK = 2048
_CHARACTERS = 8_000_000
# Records that are searched for other broken records, and the largest number of them in a message.
_SEARCHED = 10_000
_NAMED = 10
_SHOWN = 170  # characters of each error in a message about several


def convert_batches(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    convert: Callable[[Record, str], T],
    config: DataConfig | None = None,
) -> Iterator[tuple[list[int], list[T]]]:
    """Yields indices and the results of ``convert`` in batches: fewer if records are long.

    Args:
      source: the records.
      indices: of the records.
      convert: called with a record and its name; raises a NaloraError for a broken record.
      config: names the fields of text records; None for others.

    Raises:
      NaloraError: a record cannot be read or converted; see `broken_records`.
    """
    done = 0
    indices = np.asarray(indices, np.int64)
    try:
        for chunk, records in batches(source, indices):
            pairs = zip(chunk, records, strict=True)
            results = [convert(record, source.where(index)) for index, record in pairs]
            yield chunk, results
            done += len(chunk)
    except EndlessTemplateError:
        raise  # a search for other broken records would take as long for each
    except NaloraError as error:
        known = None
        if done:
            known = source[int(indices[0])]
        remaining = indices[done:]
        raise broken_records(
            error, source, remaining, convert, config, known
        ) from error


def tokenize_texts(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    render: Callable[[Record, str], tuple[list[Rendered], T]],
    tokenizer: Tokenizer,
    config: DataConfig | None = None,
    *,
    end: bool = True,
) -> Iterator[tuple[int, list[Rendered], list[Example], T]]:
    """Yields the index of each record, its texts and their tokens, and the rest of what ``render``
    returned.

    Args:
      source, indices, config: as of `convert_batches`.
      render: returns the texts of a record, and anything else.
      tokenizer, end: as of `tokenize`.
    """
    with count_progress("tokenizing", len(indices)) as done:
        for chunk, rendered in convert_batches(source, indices, render, config):
            every = list(chain.from_iterable(texts for texts, _ in rendered))
            examples = iter(tokenize(every, tokenizer, end=end))
            for index, (texts, more) in zip(chunk, rendered, strict=True):
                yield index, texts, [next(examples) for _ in texts], more
            done(len(chunk))


def broken_records(
    first: NaloraError,
    source: Source,
    indices: Sequence[int] | np.ndarray,
    convert: Callable[[Record, str], Any],
    config: DataConfig | None = None,
    known: Record | None = None,
) -> NaloraError:
    """Returns an error that names up to ten broken records of a source.

    If all records fail in the same way, the settings are wrong rather than the records, and the
    first record's error is returned.

    Args:
      first: the error of a record at ``indices``.
      source: the records.
      indices: of records to search; at most 10,000 are.
      convert: called with a record and its name; raises a NaloraError for a broken record.
      config: names the fields of text records; None for others.
      known: a record that `convert` accepts, if one is known.
    """
    errors: list[NaloraError] = []
    odd = set()  # names of records that lack a field
    for index in map(int, indices[:_SEARCHED]):
        where = source.where(index)
        try:
            record = source[index]
            convert(record, where)
        except NaloraError as error:
            errors.append(error)
            if isinstance(error, MissingFieldError) and error.where == where:
                odd.add(where)
            if len(errors) == _NAMED:
                break
        else:
            known = known or record
    if known is not None and config is not None:
        form = form_of(known, config)
        expected = f"{form}, as in the other records"
        remedy = "fix or remove this record"
        for i, broken in enumerate(errors):
            if broken.where in odd:
                found = f"fields {broken.found}"
                errors[i] = NaloraError(
                    broken.where, expected=expected, found=found, remedy=remedy
                )
    reasons = {(str(error.expected), str(error.found)) for error in errors}
    if len(errors) < 2 or (known is None and len(reasons) == 1):
        return next(iter(errors), first)
    remedies = list(dict.fromkeys(error.remedy for error in errors))
    common = ""
    if len(remedies) == 1:
        common = remedies[0]
    lines = []
    shown = {common, ""}
    for broken in errors:
        # Without the folders, which the first line names: a long path would leave no room for the
        # error.
        place = broken.where.rpartition("/")[2]
        short = NaloraError(place, expected=broken.expected, found=broken.found)
        line = shorten(" ".join(str(short).split()), _SHOWN)
        if broken.remedy not in shown:  # once, in the line of the first record
            line += f"; {shorten(broken.remedy, _SHOWN)}"
            shown.add(broken.remedy)
        lines.append(line)
    count = len(errors) if len(errors) < _NAMED else f"{_NAMED} or more"
    found = "\n  ".join([f"{count} broken ones:", *lines])
    return ListedError(
        source.name, expected="records without errors", found=found, remedy=common
    )


def batches(
    source: Source, indices: np.ndarray
) -> Iterator[tuple[list[int], list[Any]]]:
    """Yields indices and records to process together: fewer if records are long."""
    start = 0
    count = 1
    while start < len(indices):
        chunk = indices[start : start + count].tolist()
        records = source.read(chunk)
        sizes = [_characters(record) for record in records]
        first = total = 0
        for i, size in enumerate(sizes):
            if i > first and total + size > _CHARACTERS:
                yield chunk[first:i], records[first:i]
                first = i
                total = 0
            total += size
        yield chunk[first:], records[first:]
        start += len(chunk)
        # As many records as would fit if they had as many characters on average.
        fitting = _CHARACTERS * len(sizes) / max(sum(sizes), 1)
        count = max(int(min(fitting, 4 * count, _CHUNK)), 1)


def _characters(value: Any) -> int:
    """Returns the number of characters in a record's texts."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(map(_characters, value))
    return 0


@dataclass(frozen=True)
class Example:
    """A tokenized text.

    Example (a prompt of 3 tokens, a completion of 2 that ends with the end-of-sequence id 0):
      >>> Example(ids=[5, 9, 4, 7, 0], answer=[False, False, False, True, True])
    """

    # Token ids, int32 [n].
    ids: np.ndarray
    # True for tokens of a completion, bool [n].
    answer: np.ndarray

    @property
    def has_target(self) -> bool:
        """Returns True if a token counts in the loss; the first never does (no predecessor)."""
        return bool(self.answer[1:].any())

    @property
    def divided(self) -> tuple[list[int], list[int]]:
        """Returns the ids of the prompt and of the completion, which is contiguous at the end.

        The first token is never predicted, so it is the prompt of a text without one.
        """
        start = max(int(np.argmax(self.answer)), 1)
        ids = self.ids.tolist()
        return ids[:start], ids[start:]


def tokenize(
    texts: Sequence[Rendered], tokenizer: Tokenizer, *, end: bool = True
) -> list[Example]:
    """Returns the token ids and loss masks of texts.

    The tokens before a completion are the tokens of the preceding text encoded alone, which the
    model reads when it generates or scores a choice. If a token crosses the boundary, the text is
    split there.

    Args:
      texts: as rendered from records.
      tokenizer: tokenizer of the model.
      end: add the end-of-sequence id to a completion that ends its text without a special token.
    """
    cuts = []  # positions inside a text at which a completion starts or ends
    for text in texts:
        ends = set(chain.from_iterable(text.answers)) - {0, len(text.text)}
        cuts.append(sorted(ends))
    encoded = _encoded([text.text for text in texts], cuts, tokenizer)
    examples = []
    for text, at, (ids, positions) in zip(texts, cuts, encoded, strict=True):
        before = []
        after = []
        size = len(text.text)
        if text.special and tokenizer.add_bos and tokenizer.bos_id is not None:
            before = [tokenizer.bos_id]
        ends_in_answer = text.answers[-1][1] == size
        if end and ends_in_answer and not set(ids[-1:]) & tokenizer.turn_ends.keys():
            after = [tokenizer.eos_id]
        every = np.array([*before, *ids, *after], np.int32)
        # Token of each character at which a completion starts or ends.
        bounds = [position + len(before) for position in (0, *positions, len(ids))]
        token_of = dict(zip([0, *at, size], bounds, strict=True))
        answer = np.zeros(len(every), bool)
        for start, stop in text.answers:
            answer[token_of[start] : token_of[stop]] = True
        answer[len(before) + len(ids) :] = True
        if tokenizer.images is not None:  # no model learns to generate images
            answer &= every != tokenizer.images.token_id
        examples.append(Example(every, answer))
    return examples


def fit_example(example: Example, max_length: int, bos_id: int | None) -> Example:
    """Returns ``example`` cut to ``max_length + 1`` tokens: inputs, each with its next token.

    The prompt is cut first, from its left (a begin-of-sequence id stays), down to the one token
    that the first target needs before it; only then the completion, from its right.
    """
    excess = len(example.ids) - (max_length + 1)
    if excess <= 0:
        return example
    keep = int(bos_id is not None and example.ids[0] == bos_id)
    first_target = 1 + int(np.argmax(example.answer[1:]))
    cut = max(0, min(excess, first_target - 1))
    index = np.r_[0:keep, keep + cut : len(example.ids)]
    index = index[: max_length + 1]
    return Example(example.ids[index], example.answer[index])


def rows_of(example: Example, config: DataConfig, bos_id: int | None) -> list[Example]:
    """Returns the rows of an example that have loss tokens: itself, or its parts with ``too_long``
    "split".

    A part has at most ``max_length + 1`` tokens and starts with the last token of the part before
    it, so that every token is a target once; a begin-of-sequence id is repeated. With ``loss_last``
    only loss tokens among the last tokens of a row count.

    Example (ids 1 to 8 after the begin-of-sequence id 0, ``max_length`` 4; targets in brackets):
      0 [1 2 3 4]   0 4 [5 6 7]   0 7 [8]
    """
    length = config.max_length
    rows = [example]
    if config.too_long == "split" and length:
        total = len(example.ids)
        keep = int(bos_id is not None and example.ids[0] == bos_id)
        rows = [Example(example.ids[: length + 1], example.answer[: length + 1])]
        for start in range(length, total - 1, length - keep):
            end = min(start + length + 1 - keep, total)
            index = np.r_[0:keep, start:end]
            answer = example.answer[index]
            # The begin-of-sequence id, and the token that was a target in the part before.
            answer[: keep + 1] = False
            rows.append(Example(example.ids[index], answer))
    last = config.loss_last  # a number of tokens, or a share below 1; 0: all
    if last:
        for i, row in enumerate(rows):
            size = len(row.ids)
            count = math.ceil(last * size)
            if last >= 1:
                count = int(last)
            counted = np.arange(size) >= size - count
            rows[i] = Example(row.ids, row.answer & counted)
    return [row for row in rows if row.has_target]


def _encoded(
    texts: Sequence[str], cuts: Sequence[list[int]], tokenizer: Tokenizer
) -> list[tuple[list[int], list[int]]]:
    """Returns the ids of texts and the token position of each of their cuts.

    A text with cuts inside tokens is encoded in parts that end at these cuts.
    """
    results = []
    encodings = tokenizer.encode_with_offsets(texts)
    for text, at, encoding in zip(texts, cuts, encodings, strict=True):
        positions = []
        inside = []  # cuts that are inside a token
        for cut in at:
            # The first token with a character at the cut or after it; some tokenizers drop white
            # space.
            tokens = (encoding.char_to_token(place) for place in range(cut, len(text)))
            known = (token for token in tokens if token is not None)
            position = next(known, len(encoding))
            positions.append(position)
            if _starts_before(encoding, position, cut):
                inside.append(cut)
        if inside:
            results.append(_joined(text, at, inside, tokenizer))
        else:
            results.append((encoding.ids, positions))
    return results


def _starts_before(encoding: tokenizers.Encoding, token: int, cut: int) -> bool:
    """Returns True if a token of the text starts before the character ``cut``."""
    characters = encoding.token_to_chars(token)
    return characters is not None and characters[0] < cut


def _joined(
    text: str, cuts: list[int], inside: list[int], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """Returns the ids of a text whose parts are encoded separately, and the token position of each
    cut.

    The parts end at the cuts ``inside``, which are some of ``cuts``.
    """
    ids: list[int] = []
    positions: list[int] = []
    parts = list(pairwise([0, *inside, len(text)]))
    at = []  # the other cuts, counted from the start of their part
    for start, stop in parts:
        at.append([cut - start for cut in cuts if start < cut < stop])
    encoded = _encoded([text[start:stop] for start, stop in parts], at, tokenizer)
    for (_, stop), (part, places) in zip(parts, encoded, strict=True):
        positions += [len(ids) + place for place in places]
        ids += part
        if stop < len(text):
            positions.append(len(ids))
    return ids, positions
