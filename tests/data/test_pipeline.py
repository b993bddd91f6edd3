"""Batches of a training run, and the length of their rows."""

import dataclasses
import json
import logging

import numpy as np
import pytest

from nalora_jax.config import DataConfig, PreferenceConfig
from nalora_jax.data import tokenize
from nalora_jax.data.pipeline import train_data, with_length
from nalora_jax.data.preference import pair_data
from nalora_jax.data.source import RecordsSource
from nalora_jax.errors import NaloraError

COUNT = 37


@pytest.fixture
def config(write_jsonl):
    records = [
        {"prompt": f"Question: {'which way ' * (n % 7)}{n}?\nAnswer:", "completion": f" up {n}"}
        for n in range(COUNT)
    ]
    return DataConfig(eval_split="unread", dataset=write_jsonl(*records), max_length=64)


@pytest.fixture
def open_data(tokenizer, cache):
    def open_data(config, **options):
        return train_data(config, tokenizer, **{"batch_size": 4, **options})

    return open_data


def take(data, count, state=None):
    batches = data.batches(state)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken, batches.get_state()


def assert_same(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def answers_of(batches, tokenizer):
    """Text of the target tokens of each example in the batches."""
    texts = []
    for batch in batches:
        names = ("targets", "loss_weights", "segment_ids")
        rows = (batch[name].reshape(-1, batch[name].shape[-1]) for name in names)
        for targets, weights, segments in zip(*rows, strict=True):
            for segment in range(1, segments.max() + 1):
                chosen = targets[(segments == segment) & (weights > 0)]
                texts.append(tokenizer.decode(chosen, skip_special=False))
    return texts


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_holds_every_example_once(open_data, config, tokenizer, pack):
    data = open_data(dataclasses.replace(config, pack=pack), batch_size=1)
    batches, _ = take(data, 2 * data.rows_per_epoch)
    expected = sorted(f" up {n}<|im_end|>" for n in range(COUNT))
    for epoch in (batches[: data.rows_per_epoch], batches[data.rows_per_epoch :]):
        assert sorted(answers_of(epoch, tokenizer)) == expected
    assert answers_of(batches[:5], tokenizer) != answers_of(batches[data.rows_per_epoch :][:5], tokenizer)
    assert data.describe()["rows_per_epoch"] == (COUNT if not pack else data.rows_per_epoch) <= COUNT
    assert data.describe()["targets"] == sum(int(batch["loss_weights"].sum()) for batch in batches) // 2


def test_resume_is_exact_across_epochs(open_data, config):
    config = dataclasses.replace(config, workers=2)
    data = open_data(config)
    steps = 3 * data.rows_per_epoch // 4
    everything, _ = take(data, steps)
    for stop in (0, 1, steps // 2):
        _, state = take(data, stop)
        rest, _ = take(open_data(config), steps - stop, json.loads(json.dumps(state)))
        assert_same(rest, everything[stop:])


def rows_of(batches):
    return {name: np.concatenate([batch[name].reshape(-1, 64) for batch in batches]) for name in batches[0]}


def test_micro_batches_and_smaller_batches_divide_the_same_rows(open_data, config):
    _, state = take(open_data(config, batch_size=8), 1)
    whole, _ = take(open_data(config, batch_size=8), 2, state)
    for options, count in (({"batch_size": 8, "accumulate": 4}, 2), ({"batch_size": 2}, 8)):
        parts, _ = take(open_data(config, **options), count, state)
        assert_same([rows_of(parts)], [rows_of(whole)])


def test_hosts_read_parts_of_the_same_batches(open_data, config):
    whole, state = take(open_data(config, batch_size=8, accumulate=2), 5)
    # Hosts of a TPU pod do not hold runs of rows: the mesh follows the torus.
    held = [(0, 3), (1,), (2,)]
    parts = [take(open_data(config, batch_size=8, accumulate=2, rows=rows), 5) for rows in held]
    assert all(part_state == state for _, part_state in parts)
    order = np.argsort(np.concatenate(held))
    joined = [
        {name: np.concatenate([batch[name] for batch in hosts], axis=1)[:, order] for name in hosts[0]}
        for hosts in zip(*(batches for batches, _ in parts), strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_length": 48}])
def test_position_of_other_data_is_refused(open_data, config, change):
    _, state = take(open_data(config), 1)
    options = {"seed": change.pop("seed")} if "seed" in change else {}
    other = open_data(dataclasses.replace(config, **change), **options)
    with pytest.raises(NaloraError, match="checkpoint: data position"):
        other.batches(state)


def test_limit_takes_the_first_of_the_shuffle(open_data, config):
    def tokens(seed):
        return open_data(dataclasses.replace(config, train_limit=5), seed=seed).store

    one = tokens(0)
    assert one.counts.examples == 5
    assert one.fingerprint == tokens(0).fingerprint != tokens(1).fingerprint


def sky(*sizes):
    return [{"prompt": "sky " * size, "completion": "blue"} for size in sizes]


def test_long_records_are_left_out_or_cut(open_data, write_jsonl, tokenizer, caplog):
    config = DataConfig(eval_split="unread", dataset=write_jsonl(*sky(1, 1, 1, 9)), max_length=8)
    caplog.set_level(logging.INFO)
    dropped = open_data(config, context=9).describe()
    assert (dropped["examples"], dropped["dropped"], dropped["truncated"]) == (3, 1, 0)
    assert "longer than the 9 tokens that a row may have with this model, --data.too-long" in caplog.text
    assert "keeps all" not in caplog.text
    open_data(config)
    assert "left out 1 of 4 records (25%), longer than --data.max-length 8; --data.max" in caplog.text
    data = open_data(dataclasses.replace(config, too_long="truncate"), batch_size=1)
    assert (data.describe()["examples"], data.describe()["truncated"]) == (4, 1)
    assert answers_of(take(data, data.rows_per_epoch)[0], tokenizer) == ["blue<|im_end|>"] * 4


REFUSED = [
    (sky(1, 9), {"too_long": "error"}, {}, "data.jsonl:2: expected at most --data.max-length 8 .*found 1. tokens"),
    (sky(9), {"too_long": "error"}, {"context": 9}, "; choose --data.too-long .*: the model has 9 positions"),
    (sky(1, 9, 9, 1, 9), {}, {}, r"3 of 5 records \(60%\).*, longer than .* 8; .*keeps all.*truncate"),
    ([{"prompt": "", "completion": "<|im_end|>"}], {}, {}, "jsonl:1: expected a token to learn, found none in 1"),
    (sky(1), {}, {"batch_size": 8, "accumulate": 3}, "batch-size: expected a multiple of the 3 micro-batches, found 8"),
]  # fmt: skip


@pytest.mark.parametrize(("records", "settings", "options", "message"), REFUSED)
def test_data_that_give_no_rows_are_refused(open_data, write_jsonl, records, settings, options, message):
    config = DataConfig(eval_split="unread", dataset=write_jsonl(*records), max_length=8, **settings)
    with pytest.raises(NaloraError, match=message):
        open_data(config, **options)


def test_tokens_are_made_once(open_data, config, tokenizer, cache, monkeypatch):
    first = open_data(config).store

    def never(*args, **options):
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "tokenize", never)
        again = open_data(config).store
        np.testing.assert_array_equal(first.tokens, again.tokens)
        np.testing.assert_array_equal(first.offsets, again.offsets)
        for change in ({"max_length": 32}, {"max_length": 32, "too_long": "truncate"}):
            assert open_data(dataclasses.replace(config, **change)).pattern.capacity == 32
        for change in ({"loss_on": "all"}, {"train_limit": 3}):
            with pytest.raises(AssertionError, match="tokenized again"):
                open_data(dataclasses.replace(config, **change))
        bos = dataclasses.replace(tokenizer, add_bos=True)
        with pytest.raises(AssertionError, match="tokenized again"):
            train_data(config, bos, batch_size=4)
    assert sorted(path.name for path in (cache / "tokens").glob(".*")) == []


@pytest.mark.parametrize("name", ["tokens.bin", "digests.json"])
def test_a_cache_that_something_wrote_over_is_made_again(open_data, config, cache, caplog, name):
    first = open_data(config).store
    tokens, fingerprint = first.tokens.copy(), first.fingerprint
    (folder,) = (cache / "tokens").iterdir()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    caplog.set_level(logging.WARNING)
    again = open_data(config).store
    said = "" if name == "digests.json" else f"{name} is"  # which digest is hit is chance
    assert f"the cached tokens in {folder} are damaged ({said}" in caplog.text
    np.testing.assert_array_equal(again.tokens, tokens)
    assert again.fingerprint == fingerprint
    caplog.clear()
    open_data(config)
    assert not caplog.records


# ---------------------------------------------------------------- lengths of rows


@pytest.mark.parametrize(
    ("sizes", "pack", "context", "length"),
    [
        ([6] * 99 + [54], True, 4096, 128),
        ([6] * 99 + [54], False, 4096, 8),
        ([402] * 99 + [3602], True, 4096, 408),
        ([402] * 99 + [3602], True, 256, 256),
        ([3002] * 99 + [27002], True, 2**24, 3008),
        # Rows become longer if short ones stay empty.
        ([80] * 50, True, 4096, 160),  # 128 would be 62.5% full
        ([80] * 50, True, 150, 128),  # no room for two
        ([80] * 50, False, 4096, 80),
    ],
)
def test_rows_take_the_length_of_most_examples_within_bounds(sizes, pack, context, length):
    assert with_length(DataConfig(pack=pack), np.array(sizes), context).max_length == length


@pytest.mark.parametrize("limit", [0, 1])
def test_lengths_are_those_of_all_records_and_of_both_answers_of_a_pair(tokenizer, cache, limit):
    config = DataConfig(eval_split="unread", train_limit=limit, pack=False)
    source = RecordsSource("texts", sky(4, 4, 400))
    data = train_data(config, tokenizer, batch_size=1, source={"train": source})
    assert 400 < data.pattern.capacity <= 416
    pairs = [{"prompt": "sky " * size, "chosen": "blue", "rejected": "green"} for size in (1, 1, 100)]
    source = RecordsSource("pairs", pairs)
    data = pair_data(source, config, PreferenceConfig("dpo"), tokenizer, batch_size=1, context=4096)
    assert 200 < data.pattern.capacity <= 224
