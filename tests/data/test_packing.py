import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalora_jax.data import packing

cases = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(
        st.lists(st.integers(1, capacity), min_size=1, max_size=60),
        st.just(capacity),
        st.integers(0, 2**32),
    )
)


@settings(max_examples=80, deadline=None)
@given(cases, st.booleans())
def test_every_example_lies_in_one_row_and_no_row_overflows(case, several):
    lengths, capacity, seed = case
    lengths = np.array(lengths)
    pattern = packing.pack(lengths, capacity, several=several)
    plan = packing.plan_rows(pattern, lengths, seed, epoch=1)
    rows = [plan.row(index) for index in range(pattern.rows)]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(len(lengths)))
    assert max(lengths[row].sum() for row in rows) <= capacity
    assert pattern.filling == pytest.approx(lengths.sum() / (len(rows) * capacity))
    if not several:
        assert len(rows) == len(lengths)


def test_fills_rows_that_best_fit_leaves_gappy():
    # Best fit puts the 6s with nothing and wastes; 6 + 4 and 5 + 5 fill every row.
    lengths = [5] * 100 + [6] * 10 + [4] * 10 + [3] * 20 + [7] * 20
    assert packing.pack(lengths, 10).filling == 1.0
    narrow = np.random.default_rng(0).normal(33, 6, 20_000).astype(int).clip(15, 64)
    assert packing.pack(narrow, 128).filling > 0.98


def test_documented_rows():
    batch = packing.fill_rows(
        [np.array([0, 1])], np.array([7, 8, 9, 4, 5]), np.array([0, 0, 1, 0, 1]), np.array([0, 3, 5]), 4
    )
    assert {name: value[0].tolist() for name, value in batch.items()} == {
        "tokens": [7, 8, 4, 0],
        "targets": [8, 9, 5, 0],
        "loss_weights": [0, 1, 1, 0],
        "segment_ids": [1, 1, 2, 0],
        "positions": [0, 1, 0, 0],
    }


def test_epochs_differ_and_repeat():
    lengths = np.random.default_rng(0).integers(1, 30, 500)
    pattern = packing.pack(lengths, 64)

    def contents(seed, epoch):
        plan = packing.plan_rows(pattern, lengths, seed, epoch)
        return [tuple(plan.row(index)) for index in range(pattern.rows)]

    assert contents(3, 5) == contents(3, 5)
    assert contents(3, 5) != contents(3, 6)
    assert contents(3, 5) != contents(4, 5)
    # Not only the order of the rows changes, but also the examples that share one.
    shared = [{frozenset(row) for row in contents(*key)} for key in ((3, 5), (3, 6), (4, 5))]
    assert shared[0] != shared[1]
    assert shared[0] != shared[2]
    orders = [packing.plan_rows(pattern, lengths, *key).order.tolist() for key in ((3, 5), (3, 6), (4, 5))]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_permutation_never_changes():
    # Positions in checkpoints mean nothing if this stream changes, whatever the release of NumPy.
    assert packing.permutation(8, 0, 1).tolist() == [3, 7, 4, 2, 1, 6, 5, 0]
