"""Training rows of distillation, and rows of a teacher that reads a system prompt before them.

With a system prompt, a record is tokenized twice. The rows of both have the same examples in the
same order, and the teacher's are longer:

    tokens          p p c c q c           segment_ids 1 1 1 1 2 2
    teacher_tokens  s s s p p c c s s s q c
    teacher_places  0 4 5 0 10 0          position of the teacher's prediction of the same target

Both predict the same targets: the tokens of the completions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_jax.config import DataConfig
from nalora_jax.data.chat_text import (
    Message,
    Rendered,
    make_turns,
    messages_of,
    render_chat,
    render_record,
)
from nalora_jax.data.forms import Parts, canonical, tools_of
from nalora_jax.data.packing import fill_rows, pack
from nalora_jax.data.pipeline import HostBatch, TrainData, packed_data
from nalora_jax.data.questions import held_out_indices, split_questions
from nalora_jax.data.source import Record, Source
from nalora_jax.data.store import open_store
from nalora_jax.data.tokenize import Example, fit_example, tokenize_texts
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer


def render_taught(
    record: Record, config: DataConfig, tokenizer: Tokenizer, where: str, system: str
) -> Rendered:
    """Returns the text of a record as a teacher with a system prompt reads it.

    A system message that the record has follows the prompt after an empty line.

    Args:
      record, config, tokenizer, where: as of `render_record`.
      system: the prompt.

    Raises:
      NaloraError: a bad record, or a plain text without ``config.chat``.
    """
    record = canonical(record, config, where)
    tools = None
    if config.messages_field in record:
        messages = messages_of(record, config, where)
        tools = tools_of(record, where)
    elif config.chat:
        prompt = str(record.get(config.prompt_field, ""))
        completion = str(record.get(config.completion_field, ""))
        messages = make_turns(prompt, completion)
    else:
        raise NaloraError(
            where,
            expected="a chat, since --distill.system is a message of one",
            found="a plain text",
            remedy="pass --data.chat: prompts are then messages of the user",
        )
    messages = add_system(messages, system)
    return render_chat(messages, config.loss_on, tokenizer, where, tools)


def add_system(messages: Sequence[Message], system: str) -> list[Message]:
    """Returns the messages with ``system`` before the text of their system message, or as one."""
    content = system
    first = messages[0]
    if first["role"] == "system" and not isinstance(first["content"], Parts):
        content = f"{system}\n\n{first['content']}"
        messages = messages[1:]
    return [{"role": "system", "content": content}, *messages]


# ---------------------------------------------------------------- training rows


@dataclass(frozen=True)
class TeacherTexts:
    """Tokens that a teacher reads, as a `nalora_jax.data.store.TokenStore` holds them."""

    tokens: np.ndarray  # int32 [tokens]
    answer: np.ndarray  # uint8 [tokens], 1 for the targets that the student has, too
    offsets: np.ndarray  # int64 [examples + 1]
    places: np.ndarray  # int64, the example of each example of the student
    capacity: int  # positions of a row
    fingerprint: str


@dataclass(frozen=True, eq=False, kw_only=True)
class TaughtData(TrainData):
    """Training rows of a run whose teacher reads longer rows."""

    teacher: TeacherTexts

    @cached_property
    def fingerprint(self) -> str:
        """Returns the identity of the stream, which does not depend on hosts or batch size."""
        return f"{super().fingerprint}:{self.teacher.fingerprint}"

    def arrays(self, rows: list[int]) -> HostBatch:
        """Returns the text arrays ``[len(rows), max_length]`` and those of `teacher_arrays`."""
        flat = super().arrays(rows)
        examples = [self.teacher.places[self.records_of(row)] for row in rows]
        return flat | teacher_arrays(flat, self.teacher, examples)


def teacher_arrays(
    batch: HostBatch, texts: TeacherTexts, examples: Sequence[np.ndarray]
) -> HostBatch:
    """Returns ``teacher_tokens``, ``teacher_positions`` and ``teacher_segment_ids`` ``[rows,
    capacity]``, and ``teacher_places`` ``[rows, seq]``.

    Args:
      batch: arrays of the student's rows.
      texts: of the teacher.
      examples: of each row, the same ones as the student's.
    """
    read = fill_rows(
        examples, texts.tokens, texts.answer, texts.offsets, texts.capacity
    )
    arrays = {
        f"teacher_{name}": read[name] for name in ("tokens", "positions", "segment_ids")
    }
    places = match_places(batch["loss_weights"], read["loss_weights"])
    return arrays | {"teacher_places": places}


def match_places(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Returns the teacher's position of each target of the student, int32 ``[rows, seq]``, 0
    elsewhere.

    Both have the same targets in the same order; the arguments are their weights ``[rows, seq]``
    and ``[rows, teacher's seq]``.
    """
    places = np.zeros(student.shape, np.int32)
    for row, weights in enumerate(student):
        places[row, weights > 0] = np.flatnonzero(teacher[row])
    return places


def taught_data(
    source: Source,
    config: DataConfig,
    tokenizer: Tokenizer,
    system: str,
    *,
    context: int,
    teacher_context: int,
    **options: Any,
) -> TrainData:
    """Tokenizes and packs the records of a distillation.

    Args:
      source: the records.
      config: how text becomes rows.
      tokenizer: tokenizer of the model.
      system: system prompt of the teacher; "": it reads the student's rows.
      context: maximum tokens of the model.
      teacher_context: maximum tokens of the teacher.
      options: passed to `packed_data`.

    Raises:
      NaloraError: bad records, texts that are too long for the teacher, or a template that writes
        other completions after a system prompt.
    """
    data = packed_data(source, config, tokenizer, context=context, **options)
    if not system:
        return data
    seed = options["seed"]

    def examples(records: Source, indices: np.ndarray) -> Iterator[tuple[int, Example]]:
        """Yields each record's index and its tokens for the teacher."""
        render = partial(_render_one, config=config, tokenizer=tokenizer, system=system)
        for index, _, (example,), _ in tokenize_texts(
            records, indices, render, tokenizer, config
        ):
            yield index, example

    # The shuffle decides which records are in both.
    store = open_store(source, config, tokenizer, seed, examples, teacher_system=system)
    places = np.searchsorted(store.records, data.store.records)
    lengths = np.diff(store.offsets)[places] - 1
    longest = int(np.argmax(lengths))
    if lengths[longest] >= teacher_context:
        raise NaloraError(
            source.where(int(data.store.records[longest])),
            expected=f"at most {teacher_context} tokens with --distill.system, the teacher's "
            "context",
            found=int(lengths[longest]) + 1,
            remedy="shorten the prompt, or leave long records out with --data.max-length",
        )
    answer = _common_targets(source, data, store, places)
    texts = TeacherTexts(
        store.tokens,
        answer,
        store.offsets,
        places,
        _capacity(data, lengths),
        store.fingerprint,
    )
    return TaughtData(**vars(data) | {"teacher": texts})


def _render_one(
    record: Record, where: str, *, config: DataConfig, tokenizer: Tokenizer, system: str
) -> tuple[list[Rendered], None]:
    """Returns the text of a record for the teacher, as `tokenize_texts` calls it."""
    return [render_taught(record, config, tokenizer, where, system)], None


def _targets(answer: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Returns the indices of all targets of a store: marked tokens but the first of an example."""
    marked = np.array(answer, bool)
    marked[offsets[:-1]] = False
    return np.flatnonzero(marked)


def _common_targets(
    source: Source, data: TrainData, store: Any, places: np.ndarray
) -> np.ndarray:
    """Returns the marks of the teacher's tokens that are targets of the student, uint8.

    A student's example that was truncated at its end has fewer targets than the teacher's.

    Raises:
      NaloraError: the targets of a record differ.
    """
    own = data.store
    of_student = _targets(own.answer, own.offsets)
    of_teacher = _targets(store.answer, store.offsets)
    # Number of targets of each example, and of all examples before it.
    bounds = np.searchsorted(of_student, own.offsets)
    counts = np.diff(bounds)
    teacher_bounds = np.searchsorted(of_teacher, store.offsets)
    available = np.diff(teacher_bounds)[places]
    fits = counts <= available
    shared = np.minimum(counts, available)
    within = np.arange(shared.sum()) - np.repeat(np.cumsum(shared) - shared, shared)
    first = of_student[np.repeat(bounds[:-1], shared) + within]
    second = of_teacher[np.repeat(teacher_bounds[:-1][places], shared) + within]
    differs = own.tokens[first] != store.tokens[second]
    owner = np.repeat(np.arange(len(shared)), shared)
    fits[owner[differs]] = False
    if not fits.all():
        index = int(own.records[int(np.argmin(fits))])
        raise _other_completion(source.where(index))
    answer = np.zeros(len(store.tokens), np.uint8)
    answer[second] = 1
    return answer


def _capacity(data: TrainData, lengths: np.ndarray) -> int:
    """Returns the positions of a teacher's row, a multiple of 8, that fit every epoch.

    A slot holds any example of its length; ``lengths`` are the examples' positions for the teacher.
    """
    own = data.store.lengths()
    largest = np.zeros(int(own.max()) + 1, np.int64)
    np.maximum.at(largest, own, lengths)
    pattern = data.pattern
    of_rows = np.add.reduceat(largest[pattern.lengths], pattern.starts[:-1])
    return -(-int(of_rows.max()) // 8) * 8


# ---------------------------------------------------------------- held-out examples


@dataclass(frozen=True)
class TaughtExample:
    """A held-out example: a text with its targets, also as the teacher reads it."""

    example: Example
    teacher: Example  # the same one without a system prompt
    prompt: str  # text, for display
    completion: str


def held_out_taught(
    records: Source,
    config: DataConfig,
    tokenizer: Tokenizer,
    system: str,
    limit: int,
    teacher_context: int,
) -> tuple[list[TaughtExample], list[TaughtExample]]:
    """Returns held-out examples in two lists: for reported results, and to choose a checkpoint.

    Args:
      records: the held-out records.
      config: names of the fields, and limits of the evaluation.
      tokenizer: tokenizer of the model.
      system: system prompt of the teacher, or "".
      limit: positions of the model's rows; longer examples are left out, or truncated as in
        training.
      teacher_context: tokens of the teacher; longer ones are left out.

    Raises:
      NaloraError: bad records, or fewer than two examples.
    """

    def render(record: Record, where: str) -> tuple[list[Rendered], None]:
        """Returns the text of a record, and that of the teacher if it differs."""
        texts = [render_record(record, config, tokenizer, where)]
        if system:
            texts.append(render_taught(record, config, tokenizer, where, system))
        return texts, None

    fitting = []
    indices = held_out_indices(records, config)
    for index, texts, examples, _ in tokenize_texts(
        records, indices, render, tokenizer, config
    ):
        example = examples[0]
        teacher = examples[-1]
        if config.too_long == "truncate":
            example = fit_example(example, limit, tokenizer.bos_id)
        is_short = len(example.ids) <= limit + 1 and len(teacher.ids) <= teacher_context
        if is_short and example.has_target:
            if system:
                teacher = _aligned(example, teacher, records.where(index))
            else:
                teacher = example
            start, stop = texts[0].answers[-1]
            text = texts[0].text
            fitting.append(
                TaughtExample(example, teacher, text[:start], text[start:stop])
            )
    return split_questions(fitting, config.eval_limit, config.select_limit)


def _aligned(example: Example, teacher: Example, where: str) -> Example:
    """Returns the teacher's example with the targets of the student's.

    Raises:
      NaloraError: they differ.
    """
    of_student = 1 + np.flatnonzero(example.answer[1:])
    of_teacher = 1 + np.flatnonzero(teacher.answer[1:])[: len(of_student)]
    if not np.array_equal(example.ids[of_student], teacher.ids[of_teacher]):
        raise _other_completion(where)
    answer = np.zeros(len(teacher.ids), bool)
    answer[of_teacher] = True
    return Example(teacher.ids, answer)


def _other_completion(where: str) -> NaloraError:
    """Returns the error of a record with other targets after a system prompt."""
    return NaloraError(
        where,
        expected="a chat template that writes the same completion after --distill.system",
        found="other tokens",
        remedy="remove the record, or use a template that copies messages",
    )


def taught_digest(items: Sequence[TaughtExample]) -> str:
    """Returns the SHA-256 of examples; equal for equal examples in the same order."""
    sha256 = hashlib.sha256()
    for item in items:
        for example in (item.example, item.teacher):
            sha256.update(example.ids.tobytes() + example.answer.tobytes() + b"|")
    return sha256.hexdigest()


def held_out_batches(
    items: Sequence[TaughtExample], length: int, rows: int, *, taught: bool
) -> Iterator[tuple[HostBatch, list[np.ndarray]]]:
    """Yields batches of packed held-out examples, and the examples of each row by segment.

    All batches have the same shapes; the last one is filled with rows without loss.

    Args:
      items: the examples.
      length: positions of a row.
      rows: of a batch.
      taught: with the arrays of a teacher that reads other rows.
    """
    own = _joined([item.example for item in items])
    pattern = pack(np.diff(own.offsets) - 1, length)
    # Slots in order of their rows get examples of their lengths.
    order = np.argsort(np.diff(own.offsets) - 1, kind="stable")
    examples = np.empty(len(items), np.int64)
    examples[np.argsort(pattern.lengths, kind="stable")] = order
    of_rows = np.split(examples, pattern.starts[1:-1])
    texts = None
    if taught:
        texts = _joined([item.teacher for item in items])
        sizes = np.diff(texts.offsets) - 1
        longest = max(int(sizes[row].sum()) for row in of_rows)
        texts = replace(texts, capacity=-(-longest // 8) * 8)
    for start in range(0, len(of_rows), rows):
        chosen = of_rows[start : start + rows]
        filled = [*chosen, *[chosen[0]] * (rows - len(chosen))]
        batch = fill_rows(filled, own.tokens, own.answer, own.offsets, length)
        if texts is not None:
            batch |= teacher_arrays(batch, texts, filled)
        batch["loss_weights"][len(chosen) :] = 0
        yield batch, chosen


def _joined(examples: Sequence[Example]) -> TeacherTexts:
    """Returns the examples as concatenated arrays."""
    sizes = [len(example.ids) for example in examples]
    return TeacherTexts(
        np.concatenate([example.ids for example in examples]),
        np.concatenate([example.answer for example in examples]).astype(np.uint8),
        np.concatenate([[0], np.cumsum(sizes)]),
        np.arange(len(examples)),
        0,
        "",
    )
