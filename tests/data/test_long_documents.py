"""Documents longer than a row, loss on the last part, plain text, and chats of many long turns."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalora_jax.config import DataConfig, PreferenceConfig, RunConfig, check
from nalora_jax.data import chat
from nalora_jax.data.chat import render_record
from nalora_jax.data.pipeline import train_data
from nalora_jax.data.questions import eval_examples
from nalora_jax.data.source import RecordsSource
from nalora_jax.data.tokenize import Example, rows_of
from nalora_jax.errors import NaloraError

BOS = 1
TEXT = {"text": "up and down " * 30}
TEMPLATES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))


def targets(rows):
    return np.concatenate([row.ids[1:][row.answer[1:]] for row in rows]).tolist() if rows else []


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(2, 9), st.booleans())
def test_every_token_of_a_split_document_is_a_target_once(data, max_length, begins):
    count = data.draw(st.integers(1, 40))
    ids = np.array([BOS] * begins + list(range(10, 10 + count)), np.int32)
    answer = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    answer[: len(ids) - count] = False
    whole = Example(ids, answer)
    rows = rows_of(whole, DataConfig(too_long="split", max_length=max_length), BOS)
    assert targets(rows) == targets([whole])
    for row in rows:
        assert len(row.ids) <= max_length + 1
        assert not begins or row.ids[0] == BOS
        assert np.all(np.diff(row.ids[begins:]) == 1)  # consecutive tokens of the document
    if len(ids) > max_length + 1 and answer.all():
        assert all(len(row.ids) == max_length + 1 for row in rows[:-1])


@pytest.mark.parametrize(("last", "counted"), [(0, 9), (3, 3), (50, 9), (0.25, 3)])
def test_loss_on_the_last_part(last, counted):
    example = Example(np.arange(10, dtype=np.int32), np.arange(10) > 0)
    assert targets(rows_of(example, DataConfig(loss_last=last), BOS)) == list(range(10 - counted, 10))


@pytest.fixture
def open_data(tokenizer, cache):
    def open_data(*records, **settings):
        config = DataConfig(**{"max_length": 24, "eval_split": "unread", **settings})
        source = {"train": RecordsSource("documents", list(records))}
        return train_data(config, tokenizer, batch_size=1, source=source)

    return open_data


def test_split_documents_are_rows_with_positions_from_0(open_data, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    ids = tokenizer.encode(TEXT["text"])
    data = open_data(TEXT, {"text": "short"}, too_long="split", loss_on="all")
    figures = data.describe()
    assert (figures["split"], figures["dropped"], figures["truncated"]) == (1, 0, 0)
    message = "1 records longer than a row of 24 tokens are split; rows of examples: "
    assert f"{message}{figures['examples']}" in caplog.text
    batches = [data.batch_at(row) for row in range(data.rows_per_epoch)]
    for batch in batches:
        segments, positions = batch["segment_ids"][0, 0], batch["positions"][0, 0]
        for segment in range(1, segments.max() + 1):
            assert positions[segments == segment].tolist() == list(range((segments == segment).sum()))
    counted = [token for batch in batches for token in batch["targets"][batch["loss_weights"] > 0].tolist()]
    expected = [*ids[1:], tokenizer.eos_id, *tokenizer.encode("short")[1:], tokenizer.eos_id]
    assert sorted(counted) == sorted(expected)


def test_split_and_last_part_are_evaluated_as_they_are_trained(open_data, tokenizer):
    settings = {"too_long": "split", "loss_on": "all", "loss_last": 5, "max_length": 24}
    data = open_data(TEXT, **settings)
    trained = [data.batch_at(row) for row in range(data.rows_per_epoch)]
    assert all((batch["loss_weights"] > 0).sum() <= 5 for batch in trained)
    source = {"held": RecordsSource("others", [TEXT])}
    items = eval_examples(DataConfig(eval_split="held", **settings), tokenizer, split="held", source=source)
    assert len(items) == data.store.counts.examples > 3
    assert all(len(item.completion_ids) <= 5 for item in items)
    assert all(len(item.prompt_ids) + len(item.completion_ids) <= 25 for item in items)
    assert all(item.completion and item.prompt for item in items)


def test_the_last_part_is_of_the_loss_tokens(open_data, tokenizer):
    record = {"prompt": "up and down " * 3, "completion": " the sky and the green hills"}
    whole, last = open_data(record), open_data(record, loss_last=2)
    assert whole.store.counts.targets > last.store.counts.targets == 2
    assert last.fingerprint != whole.fingerprint
    pairs = ("user", "up"), ("assistant", "the sky"), ("user", "ok")
    chat = {"messages": [{"role": role, "content": content} for role, content in pairs]}
    message = r"expected a token to learn in the last part \(--data.loss-last 2\), found none"
    with pytest.raises(NaloraError, match=message):
        open_data(chat, loss_on="assistant", loss_last=2, max_length=64)


def test_pairs_are_not_divided():
    for name, value, expected in (
        ("loss_last", 4.0, "0"),
        ("too_long", "split", "drop or truncate or error"),
    ):
        message = f"--data.{name.replace('_', '-')}: expected {expected} with --preference.loss"
        with pytest.raises(NaloraError, match=message):
            check(RunConfig(data=DataConfig(**{name: value}), preference=PreferenceConfig("dpo")))


def test_plain_text_is_learned_and_evaluated_without_a_prompt(open_data, tokenizer):
    batch = open_data(TEXT, max_length=400).batch_at(0)
    ids = [*tokenizer.encode(TEXT["text"]), tokenizer.eos_id]
    assert batch["targets"][batch["loss_weights"] > 0].tolist() == ids[1:]
    source = {"held": RecordsSource("others", [TEXT])}
    (item,) = eval_examples(DataConfig(eval_split="held"), tokenizer, split="held", source=source)
    assert item.prompt_ids + item.completion_ids == ids[:-1]
    assert len(item.prompt_ids) == 1


def talk(thought=""):
    messages = []
    for i in range(4):
        question = f"  Question {i}: which way is up, and which is down?  " * 3
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": f"{thought}Answer {i}: the sky. " * 5})
    return messages


@pytest.mark.parametrize("thought", ["", "<think>\nhm\n</think>\n\n"])
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_masks_of_long_chats_do_not_depend_on_short_contents(tokenizer, monkeypatch, path, thought):
    """Released templates: those that rewrite contents are rendered in full, or refused as always."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = dataclasses.replace(tokenizer, chat_template=path.read_text(), special_tokens=special)
    config, record = DataConfig(loss_on="assistant"), {"messages": talk(thought)}
    results = []
    for most in (10**9, 0):
        monkeypatch.setattr(chat, "_MOST", most)
        try:
            results.append(render_record(record, config, ours, "here"))
        except NaloraError as error:
            results.append(str(error))
    assert results[0] == results[1]
