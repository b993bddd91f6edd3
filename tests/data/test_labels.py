"""Labels of records: their forms, the outputs of a head, and their errors."""

from __future__ import annotations

import pytest

from nalora_jax.data.labels import LabelSet, find_labels
from nalora_jax.data.source import RecordsSource
from nalora_jax.errors import NaloraError

QUESTION = {"prompt": "x", "choices": ["yes", "no"], "gold": 1}


def found(values, form="auto", count=0):
    records = [value if isinstance(value, dict) else {"label": value} for value in values]
    source = RecordsSource("records", records)
    return find_labels(source, range(len(records)), "label", form, count)


@pytest.mark.parametrize(
    ("values", "form", "names", "targets"),
    [
        (["b", "a", "b"], "one", "a b", [0, 1]),
        ([2, 0, 1], "one", "0 1 2", [0, 0, 1]),
        ([True, False], "one", "0 1", [0, 1]),
        ([QUESTION, QUESTION | {"gold": 0}], "one", "no yes", None),
        ([["b", "a"], [], ["b"]], "several", "a b", [1, 1]),
        ([[1], [0, 2]], "several", "0 1 2", [0, 1, 0]),
        ([[0.0, 1.0], [1.0, 1.0]], "several", "0 1", [0, 1]),
        ([0.5, 2, -1.0], "score", "0", [0.5]),
    ],
)
def test_the_first_label_tells_the_form(values, form, names, targets):
    labels = found(values)
    assert labels == LabelSet(form, tuple(names.split()))
    if targets is not None:
        assert labels.encode(values[0], "record") == targets


def test_a_number_of_labels_may_be_larger_than_those_of_the_records():
    assert found([0, 1], count=4).names == ("0", "1", "2", "3")
    assert found([[0.5, 3.0]], form="score").names == ("0", "1")


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        ([{"text": "a"}], {}, "a field 'label', found the fields text"),
        ([None, "a"], {}, "a field 'label'"),
        ([{"label": {}}], {}, "a name, a number, or a list of them"),
        ([float("nan")], {}, "a name, a number, or a list of them"),
        (["a", "a"], {}, "two labels or more, found a in all of 2 records"),
        ([-1, 0], {}, "labels from 0, found -1"),
        ([0, 5], {"count": 3}, "3 labels, as --kind classify:labels=3 says, found 6"),
        (["a", "b"], {"count": 3}, "3 labels, .*, found 2: a, b"),
    ],
)
def test_records_without_fitting_labels_are_refused(values, options, said):
    with pytest.raises(NaloraError, match=said):
        found(values, **options)


@pytest.mark.parametrize(
    ("form", "value", "said"),
    [
        ("one", "c", "one of the labels a, b, found 'c'"),
        ("one", 0.5, "a value of the form 'one'"),
        ("several", "a", "a value of the form 'several'"),
        ("several", [1.0], "2 values, one for each output, found 1"),
    ],
)
def test_a_label_that_the_head_does_not_have_is_refused(form, value, said):
    with pytest.raises(NaloraError, match=f"record 7.*{said}"):
        LabelSet(form, ("a", "b")).encode(value, "record 7: label")


def test_labels_are_read_as_they_were_written(tmp_path):
    labels = LabelSet("several", ("a", "ü"))
    labels.write(tmp_path)
    assert LabelSet.read(tmp_path) == labels
    (tmp_path / "labels.json").write_text('{"form": "one"}')
    with pytest.raises(NaloraError, match="the names of the head's outputs, found KeyError"):
        LabelSet.read(tmp_path)
