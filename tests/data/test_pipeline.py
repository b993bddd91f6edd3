"""Packed rows, the batches of a training run, and examples that are longer than a row."""

import json
import logging
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalora_jax.config import DataConfig, PreferenceConfig
from nalora_jax.data import packing, tokenize
from nalora_jax.data.pipeline import resolve_row_length, stream_text, train_data
from nalora_jax.data.preference_pairs import pair_data
from nalora_jax.data.source import RecordsSource
from nalora_jax.data.tokenize import Example, fit_example, rows_of
from nalora_jax.errors import NaloraError

COUNT, BOS = 37, 1

lengths_in_rows = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(
        st.lists(st.integers(1, capacity), min_size=1, max_size=60),
        st.just(capacity),
        st.integers(0, 2**32),
    )
)


@settings(max_examples=80, deadline=None)
@given(lengths_in_rows, st.booleans())
def test_every_example_lies_in_one_row_and_no_row_overflows(case, several):
    lengths, capacity, seed = np.array(case[0]), *case[1:]
    pattern = packing.pack(lengths, capacity, several=several)
    plan = packing.plan_rows(pattern, lengths, seed, epoch=1)
    rows = [plan.row(index) for index in range(pattern.rows)]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(len(lengths)))
    assert max(lengths[row].sum() for row in rows) <= capacity
    assert pattern.efficiency == pytest.approx(lengths.sum() / (len(rows) * capacity))
    assert several or len(rows) == len(lengths)


def test_fills_rows_that_best_fit_leaves_gappy():
    # Best fit puts the 6s with nothing and wastes; 6 + 4 and 5 + 5 fill every row.
    assert packing.pack([5] * 100 + [6] * 10 + [4] * 10 + [3] * 20 + [7] * 20, 10).efficiency == 1.0
    narrow = np.random.default_rng(0).normal(33, 6, 20_000).astype(int).clip(15, 64)
    assert packing.pack(narrow, 128).efficiency > 0.98


def test_documented_rows():
    arrays = np.array([7, 8, 9, 4, 5]), np.array([0, 0, 1, 0, 1]), np.array([0, 3, 5])
    batch = packing.fill_rows([np.array([0, 1])], *arrays, 4)
    assert {name: value[0].tolist() for name, value in batch.items()} == {
        "tokens": [7, 8, 4, 0],
        "targets": [8, 9, 5, 0],
        "loss_weights": [0, 1, 1, 0],
        "segment_ids": [1, 1, 2, 0],
        "positions": [0, 1, 0, 0],
    }


def test_epochs_differ_and_repeat():
    """Both the order of the rows and the examples that share one."""
    lengths = np.random.default_rng(0).integers(1, 30, 500)
    pattern = packing.pack(lengths, 64)

    def plan_of(seed, epoch):
        plan = packing.plan_rows(pattern, lengths, seed, epoch)
        return plan.order.tolist(), {frozenset(plan.row(index)) for index in range(pattern.rows)}

    assert plan_of(3, 5) == plan_of(3, 5)
    for key in ((3, 6), (4, 5)):
        assert all(one != other for one, other in zip(plan_of(3, 5), plan_of(*key), strict=True))


def test_permutation_never_changes():
    # Positions in checkpoints mean nothing if this stream changes, whatever the release of NumPy.
    assert packing.permutation(8, 0, 1).tolist() == [3, 7, 4, 2, 1, 6, 5, 0]


# ---------------------------------------------------------------- batches


@pytest.fixture
def config(write_jsonl):
    prompts = (f"Question: {'which way ' * (n % 7)}{n}?\nAnswer:" for n in range(COUNT))
    records = [{"prompt": prompt, "completion": f" up {n}"} for n, prompt in enumerate(prompts)]
    return DataConfig(eval_split="unread", dataset=write_jsonl(*records), max_length=64)


@pytest.fixture
def open_data(tokenizer, cache):
    def open_data(config, **options):
        return train_data(config, tokenizer, **{"batch_size": 4, **options})

    return open_data


@pytest.fixture
def open_records(open_data):
    def open_records(*records, options=(), **settings):
        config = DataConfig(**{"max_length": 24, "eval_split": "unread", **settings})
        source = {"train": RecordsSource("documents", list(records))}
        return open_data(config, source=source, **{"batch_size": 1, **dict(options)})

    return open_records


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
    """Text of the target tokens of each example in batches of one row."""
    texts = []
    for batch in batches:
        segments, counts = batch["segment_ids"], batch["loss_weights"] > 0
        for segment in range(1, segments.max() + 1):
            targets = batch["targets"][(segments == segment) & counts]
            texts.append(tokenizer.decode(targets, skip_special=False))
    return texts


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_holds_every_example_once(open_data, config, tokenizer, pack):
    data = open_data(replace(config, pack=pack), batch_size=1)
    size = data.rows_per_epoch
    batches, _ = take(data, 2 * size)
    expected = sorted(f" up {n}<|im_end|>" for n in range(COUNT))
    for epoch in (batches[:size], batches[size:]):
        assert sorted(answers_of(epoch, tokenizer)) == expected
    assert answers_of(batches[:5], tokenizer) != answers_of(batches[size:][:5], tokenizer)
    assert data.describe()["rows_per_epoch"] == (size if pack else COUNT) <= COUNT
    assert (
        data.describe()["targets"]
        == sum(int(batch["loss_weights"].sum()) for batch in batches) // 2
    )


def test_resume_is_exact_across_epochs(open_data, config):
    config = replace(config, workers=2)
    data = open_data(config)
    steps = 3 * data.rows_per_epoch // 4
    everything, _ = take(data, steps)
    for stop in (0, 1, steps // 2):
        _, state = take(data, stop)
        rest, _ = take(open_data(config), steps - stop, json.loads(json.dumps(state)))
        assert_same(rest, everything[stop:])


def test_micro_batches_and_smaller_batches_divide_the_same_rows(open_data, config):
    def rows(batches):
        return {
            n: np.concatenate([batch[n].reshape(-1, 64) for batch in batches]) for n in batches[0]
        }

    _, state = take(open_data(config, batch_size=8), 1)
    whole, _ = take(open_data(config, batch_size=8), 2, state)
    for options, count in (({"batch_size": 8, "accumulate": 4}, 2), ({"batch_size": 2}, 8)):
        parts, _ = take(open_data(config, **options), count, state)
        assert_same([rows(parts)], [rows(whole)])


def test_hosts_read_parts_of_the_same_batches(open_data, config):
    options = {"batch_size": 8, "accumulate": 2}
    whole, state = take(open_data(config, **options), 5)
    # Hosts of a TPU pod do not hold runs of rows: the mesh follows the torus.
    held = [(0, 3), (1,), (2,)]
    parts = [take(open_data(config, **options, rows=rows), 5) for rows in held]
    assert all(part_state == state for _, part_state in parts)
    order = np.argsort(np.concatenate(held))
    joined = [
        {
            name: np.concatenate([batch[name] for batch in hosts], axis=1)[:, order]
            for name in hosts[0]
        }
        for hosts in zip(*(batches for batches, _ in parts), strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize(("options", "change"), [({"seed": 1}, {}), ({}, {"max_length": 48})])
def test_position_of_other_data_is_refused(open_data, config, options, change):
    _, state = take(open_data(config), 1)
    with pytest.raises(NaloraError, match="checkpoint: data position"):
        open_data(replace(config, **change), **options).batches(state)


def test_limit_takes_the_first_of_the_shuffle(open_data, config):
    one, again, other = (
        open_data(replace(config, train_limit=5), seed=seed).store for seed in (0, 0, 1)
    )
    assert one.counts.examples == 5
    assert one.fingerprint == again.fingerprint != other.fingerprint


# ---------------------------------------------------------------- examples that are longer than a
# row


def sky(*sizes):
    return [{"prompt": "sky " * size, "completion": "blue"} for size in sizes]


def test_long_records_are_left_out_or_cut(open_records, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    records = sky(1, 1, 1, 9)
    dropped = open_records(*records, max_length=8, options={"context": 9}).describe()
    assert (dropped["examples"], dropped["dropped"], dropped["truncated"]) == (3, 1, 0)
    assert (
        "longer than the 9 tokens that a row may have with this model, --data.too-long"
        in caplog.text
    )
    assert "keeps all" not in caplog.text
    open_records(*records, max_length=8)
    assert (
        "left out 1 of 4 records (25%), longer than --data.max-length 8; --data.max" in caplog.text
    )
    data = open_records(*records, max_length=8, too_long="truncate")
    assert (data.describe()["examples"], data.describe()["truncated"]) == (4, 1)
    assert (
        answers_of(map(data.batch_at, range(data.rows_per_epoch)), tokenizer)
        == ["blue<|im_end|>"] * 4
    )
    rows = open_records(*records, {"text": "sky " * 9}, max_length=8, too_long="split").describe()
    assert (rows["split"], rows["dropped"], rows["truncated"]) == (2, 0, 0)


TURNS = (("user", "up"), ("assistant", "sky"), ("user", "ok"))
CHAT = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
REFUSED = [
    (sky(1, 9), {"too_long": "error"}, {}, "record 1: expected at most --data.max-length 8 .*found 1. tokens"),
    (sky(1, 9, 9, 1, 9), {}, {}, r"3 of 5 records \(60%\).*, longer than .* 8; .*keeps all.*truncate"),
    ([{"prompt": "", "completion": "<|im_end|>"}], {}, {}, "record 0: expected a token to learn, found none in 1"),
    (sky(1), {}, {"batch_size": 8, "accumulate": 3}, "batch-size: expected a multiple of the 3 micro-batches, found 8"),
    ([CHAT], {"loss_on": "assistant", "loss_last": 2, "max_length": 64}, {},
     r"expected a token to learn in the last part \(--data.loss-last 2\), found none"),
]  # fmt: skip


@pytest.mark.parametrize(("records", "settings", "options", "message"), REFUSED)
def test_data_that_give_no_rows_are_refused(open_records, records, settings, options, message):
    with pytest.raises(NaloraError, match=message):
        open_records(*records, options=options, **{"max_length": 8, **settings})


@pytest.mark.parametrize(
    ("prompt", "answer", "bos", "expected"),
    [
        (3, 2, None, [1, 2, 3, 4, 5]),  # fits: 4 inputs and the token after
        (5, 2, None, [3, 4, 5, 6, 7]),  # the prompt goes from the left
        (5, 2, 1, [1, 4, 5, 6, 7]),  # but for its begin-of-sequence id
        (
            3,
            9,
            None,
            [3, 4, 5, 6, 7],
        ),  # one token stays before the answer, which goes from the right
        (3, 9, 1, [1, 4, 5, 6, 7]),
        (0, 9, None, [1, 2, 3, 4, 5]),
        (1, 9, None, [1, 2, 3, 4, 5]),
        (2, 3, None, [1, 2, 3, 4, 5]),  # fits exactly
        (2, 3, 1, [1, 2, 3, 4, 5]),
        (6, 1, None, [3, 4, 5, 6, 7]),
    ],
)
def test_truncation_keeps_answers(prompt, answer, bos, expected):
    ids = np.arange(1, prompt + answer + 1)
    cut = fit_example(Example(ids, ids > prompt), 4, bos)
    assert cut.ids.tolist() == expected
    assert cut.answer.tolist() == [index > prompt for index in expected]
    assert cut.has_target


@pytest.mark.parametrize(("first", "expected"), [(0, [1, 2, 3, 4, 5]), (6, [3, 4, 5, 6, 7])])
def test_truncation_keeps_the_token_before_the_first_target(first, expected):
    """The first token is no target, even of a text with the loss on all of it."""
    ids = np.arange(1, 8)
    answer = np.arange(7) >= first
    answer[0] = True
    cut = fit_example(Example(ids, answer), 4, None)
    assert cut.ids.tolist() == expected
    assert cut.has_target


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
    assert targets(rows_of(example, DataConfig(loss_last=last), BOS)) == list(
        range(10 - counted, 10)
    )


# ---------------------------------------------------------------- the cache of tokens


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
            assert open_data(replace(config, **change)).pattern.capacity == 32
        for last in (1, 2):
            assert open_data(replace(config, loss_last=last)).store.counts.targets == last * COUNT
        changes = ({"loss_on": "all"}, {"train_limit": 3})
        others = [(replace(config, **change), tokenizer) for change in changes]
        for other in (*others, (config, replace(tokenizer, add_bos=True))):
            with pytest.raises(AssertionError, match="tokenized again"):
                train_data(*other, batch_size=4)
    assert sorted(path.name for path in (cache / "tokens").glob(".*")) == []


def test_figures_of_a_stream_are_one_line(open_records):
    text = stream_text(open_records(*sky(1, 1, 1, 1), max_length=64).describe())
    assert re.search(r"^4 examples, .* epoch, packing efficiency \d\d?\.\d%", text)
    assert "dropped" not in text


@pytest.mark.parametrize("name", ["tokens.bin", "digests.json"])
def test_a_cache_that_something_wrote_over_is_made_again(open_data, config, cache, caplog, name):
    first = open_data(config).store
    tokens = first.tokens.copy()
    (folder,) = (cache / "tokens").iterdir()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    caplog.set_level(logging.WARNING)
    again = open_data(config).store
    said = "" if name == "digests.json" else f"{name} is"  # which digest is hit is chance
    assert f"the cached tokens in {folder} are damaged ({said}" in caplog.text
    np.testing.assert_array_equal(again.tokens, tokens)
    assert again.fingerprint == first.fingerprint
    caplog.clear()
    open_data(config)
    assert not caplog.records


@pytest.mark.parametrize(
    ("sizes", "pack", "context", "length"),
    [
        ([6] * 99 + [54], True, 4096, 128),
        ([6] * 99 + [54], False, 4096, 8),
        ([402] * 99 + [3602], True, 256, 256),
        # Rows become longer if short ones stay empty.
        ([80] * 50, True, 4096, 160),  # 128 would be 62.5% full
        ([80] * 50, True, 150, 128),  # no room for two
        ([80] * 50, False, 4096, 80),
    ],
)
def test_rows_take_the_length_of_most_examples_within_bounds(sizes, pack, context, length):
    assert resolve_row_length(DataConfig(pack=pack), np.array(sizes), context).max_length == length


@pytest.mark.parametrize("limit", [0, 1])
def test_lengths_are_those_of_all_records_and_of_both_answers_of_a_pair(
    open_records, tokenizer, limit
):
    options = {"train_limit": limit, "pack": False, "max_length": 0}
    assert 400 < open_records(*sky(4, 4, 400), **options).pattern.capacity <= 416
    pairs = [
        {"prompt": "sky " * size, "chosen": "blue", "rejected": "green"} for size in (1, 1, 100)
    ]
    config, source = DataConfig(**options), RecordsSource("pairs", pairs)
    data = pair_data(source, config, PreferenceConfig("dpo"), tokenizer, batch_size=1, context=4096)
    assert 200 < data.pattern.capacity <= 224
