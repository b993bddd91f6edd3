from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from nalora_jax.config import DataConfig, PreferenceConfig
from nalora_jax.data.pipeline import example_lengths, with_length
from nalora_jax.data.preference import pair_sizes
from nalora_jax.data.source import RecordsSource


def source(*sizes: int) -> RecordsSource:
    return RecordsSource("sizes", [{"prompt": "sky " * size, "completion": "blue"} for size in sizes])


@pytest.mark.parametrize(
    ("size", "pack", "context", "length"),
    [
        (4, True, 4096, 128),
        (4, False, 4096, None),
        (400, True, 4096, None),
        (400, True, 256, 256),
        (3000, True, 2**24, 3008),
    ],
)
def test_rows_take_the_length_of_most_examples_within_bounds(tokenizer, size, pack, context, length):
    config, records = DataConfig(pack=pack), source(*[size] * 99, 9 * size)
    fitting = int(example_lengths(source(size), config, tokenizer)[0])
    measure = partial(example_lengths, records, config, tokenizer)
    chosen = with_length(config, measure, context).max_length
    assert chosen == (length or -(-fitting // 8) * 8)
    assert with_length(DataConfig(max_length=7), measure, context).max_length == 7


@pytest.mark.parametrize(
    ("sizes", "context", "pack", "length"),
    [
        ([80], 4096, True, 160),  # 128 would be 62.5% full
        ([80], 150, True, 128),  # no room for two
        ([80], 4096, False, 80),
    ],
)
def test_rows_become_longer_if_short_ones_stay_empty(sizes, context, pack, length):
    config = DataConfig(pack=pack)
    measured = with_length(config, lambda: np.array(sizes * 50), context)
    assert measured.max_length == length


def test_a_pair_s_length_is_that_of_both_answers(tokenizer):
    records = [{"prompt": "sky " * 100, "chosen": "blue", "rejected": "green"}] * 3
    pairs = RecordsSource("pairs", records)
    sizes = pair_sizes(pairs, DataConfig(), tokenizer, PreferenceConfig("dpo"))
    assert len(sizes) == 3
    measured = with_length(DataConfig(), lambda: sizes, 4096).max_length
    assert sizes[0] <= measured < sizes[0] + 8
    one = example_lengths(source(100), DataConfig(), tokenizer)[0]
    assert abs(sizes[0] - 2 * one) < 20  # a row holds both answers, each after its prompt
