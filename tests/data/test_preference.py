"""Preference pairs of records, and their stores of tokens."""

import logging

import numpy as np
import pytest

from nalora_jax.config import DataConfig, PreferenceConfig
from nalora_jax.data.preference_pairs import held_out_pairs, pair_data
from nalora_jax.data.source import RecordsSource
from tests.data.loss_tokens import runs

CONFIG = DataConfig(max_length=64)
DPO = PreferenceConfig("dpo")
CHOICES = ["the sky", "the sea", "the hills"]
END = "<|im_end|>"


def opened(tokenizer, *records, preference=DPO):
    source = RecordsSource("pairs", records)
    return pair_data(source, CONFIG, preference, tokenizer, batch_size=1)


def completions(data, tokenizer):
    """Returns the learned text of each side of a store, the chosen and the rejected one in turn."""
    store = data.store
    places = [slice(*pair) for pair in zip(store.offsets[:-1], store.offsets[1:], strict=True)]
    learned = [runs(store.tokens[place], store.answer[place], tokenizer) for place in places]
    return [text for (text,) in learned]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("choices", "gold", "chosen", "rejected"),
    [
        (CHOICES, 0, "the sky", "the sea"),
        (CHOICES, 1, "the sea", "the hills"),
        (CHOICES, 2, "the hills", "the sky"),
        (["the sky", "the sky", "the sea"], 0, "the sky", "the sea"),
    ],
)
def test_training_pair_of_a_question_has_the_wrong_choice_after_the_right_one(
    tokenizer, caplog, choices, gold, chosen, rejected
):
    caplog.set_level(logging.INFO)
    record = {"prompt": "Which way is up?", "choices": choices, "gold": gold}
    expected = [f" {chosen}{END}", f" {rejected}{END}"]
    for _ in range(2):  # the second time from the store
        assert completions(opened(tokenizer, record), tokenizer) == expected
    assert caplog.text.count("tokenized pairs") == 1


@pytest.mark.usefixtures("cache")
def test_store_of_pairs_depends_on_the_fields_of_both_sides(tokenizer):
    record = {"prompt": "up", "a": " sky", "b": " sea", "c": " hills"}
    for chosen, rejected in ("ab", "ba", "ac", "cb"):
        fields = PreferenceConfig("dpo", chosen_field=chosen, rejected_field=rejected)
        data = opened(tokenizer, record, preference=fields)
        expected = [record[chosen] + END, record[rejected] + END]
        assert completions(data, tokenizer) == expected


@pytest.mark.parametrize("long", ["chosen", "rejected"])
def test_held_out_pairs_fit_the_context_with_both_sides(tokenizer, long):
    short = {"prompt": "up", "chosen": " sky", "rejected": " sea"}
    records = [*[short] * 3, short | {long: " sky" * 50}]
    source = RecordsSource("pairs", records)
    parts = held_out_pairs(source, CONFIG, DPO, tokenizer, context=40)
    sizes = [max(len(pair.chosen.ids), len(pair.rejected.ids)) for part in parts for pair in part]
    assert len(sizes) == 3
    assert max(sizes) <= 40
    exact = held_out_pairs(source, CONFIG, DPO, tokenizer, context=max(sizes))
    assert sum(map(len, exact)) == 3


def test_length_of_a_training_pair_is_that_of_both_sides(tokenizer):
    data = opened(tokenizer, {"prompt": "up", "chosen": " sky", "rejected": " sea" * 5})
    sizes = np.diff(data.store.offsets)
    assert sizes[0] < sizes[1]
    assert data.pattern.lengths.tolist() == [sizes.sum() - 2]
