"""Files of every kind give the same records, by index, and say where a broken one is."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from nalora_jax.config import DataConfig
from nalora_jax.data.data_files import open_rows
from nalora_jax.data.sources import open_source
from nalora_jax.errors import NaloraError

RECORDS = [
    {"prompt": f'question {i}, "quoted"\nsecond line', "completion": f" answer {i} \u2028\u00e9"}
    for i in range(23)
]


def opened(path, split="train"):
    return open_source(DataConfig(dataset=str(path)), split)


def delimited(delimiter):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(RECORDS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue()


def write_array_record(path):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in RECORDS:
        writer.write(json.dumps(record).encode())
    writer.close()


def write_arrow(path, records, new=pa.ipc.new_file):
    table = pa.Table.from_pylist(records)
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def save_to_disk(folder, records):
    """As datasets.Dataset.save_to_disk lays a folder out, in two shards."""
    folder.mkdir(parents=True)
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (records[:9], records[9:]), strict=True):
        write_arrow(folder / name, part, pa.ipc.new_stream)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]})
    )
    (folder / "dataset_info.json").write_text("{}")


WRITERS = {
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, RECORDS))),
    "array.json": lambda path: path.write_text(
        "\ufeff " + json.dumps(RECORDS, indent=1), encoding="utf-8"
    ),
    "a.csv": lambda path: path.write_text(delimited(","), encoding="utf-8-sig", newline=""),
    "a.TSV": lambda path: path.write_text(delimited("\t"), encoding="utf-8", newline=""),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=4),
    "a.array_record": write_array_record,
    "a.feather": lambda path: write_arrow(path, RECORDS),
    "saved": lambda path: save_to_disk(path, RECORDS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_records_by_index(tmp_path, name):
    WRITERS[name](tmp_path / name)
    source, part = (
        opened(tmp_path / name, split) for split in ("train", "train[3:5]+train[-20%:]")
    )
    assert len(source) == len(RECORDS)
    order = [22, 0, 7, 7, 13, 4, -1]
    assert source.read(order) == [RECORDS[i] for i in order]
    assert part.read(range(len(part))) == [*RECORDS[3:5], *RECORDS[18:]]
    assert part.fingerprint != source.fingerprint
    assert str(tmp_path / name) in part.where(0)


def test_lines_are_counted_past_blank_ones(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n{"a": "\xc3\xbc"}\n   \r\n{"a": 2}\r\n\n{"a": 3}')
    lines = open_rows(path)
    assert lines.read([2, 0, 1]) == [{"a": 3}, {"a": "ü"}, {"a": 2}]
    assert [lines.where(index) for index in range(3)] == [f"{path}:2", f"{path}:4", f"{path}:6"]


def test_a_folder_has_the_splits_that_its_names_say(tmp_path):
    folder = tmp_path / "mine"
    parts = [f"train-0000{i}-of-00002.parquet" for i in range(2)]
    for name in (*parts, "data/validation/part.csv", "dev.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        WRITERS["a" + (folder / name).suffix](folder / name)
    (folder / "README.md").write_text("no data")
    train = opened(folder)
    assert train.read([0, 22, 23, 45]) == [RECORDS[0], RECORDS[22], RECORDS[0], RECORDS[22]]
    assert train.siblings == ("validation", "train")
    assert len(opened(folder, "validation")) == 46
    assert len(opened(folder, "train[:10]+validation[-2:]")) == 12
    with pytest.raises(NaloraError, match=r"expected validation, train, or slices"):
        opened(folder, "test")
    assert len(opened(folder / "train-*.parquet")) == 46


def test_a_saved_dict_of_data_sets_has_its_splits(tmp_path):
    save_to_disk(tmp_path / "dict" / "train", RECORDS[:18])
    save_to_disk(tmp_path / "dict" / "validation", RECORDS[9:])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert len(opened(tmp_path / "dict")) == 18
    assert opened(tmp_path / "dict", "validation").read([13]) == [RECORDS[22]]


BROKEN = [
    ("a.json", '[{"a": 1}, 2', r"a\.json: expected a JSON array of objects"),
    ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: expected 2 values, one for each of a, b, found 1"),
    ("a.csv", "a,a\n1,2\n", r"a\.csv:1: expected a name of its own for every column, found 'a', 'a'"),
    ("a.csv", 'a,b\n1,"2"x\n', r"a\.csv:1: expected rows of text in UTF-8"),
    ("no.csv", None, r"no\.csv: expected a readable"),
    ("none-*.csv", None, r"none-\*\.csv\[train\]: expected at least one record"),
    ("a.parquet", "PAR1 and no more", r"a\.parquet: expected a readable parquet file"),
    ("a.arrow", "nothing", r"a\.arrow: expected a readable arrow file"),
    ("a.csv", "a,b\n", "expected at least one record"),
    ("a.jsonl", " \n\n", r"a\.jsonl: expected at least one JSON line, found an empty file"),
    ("saved/state.json", '{"_data_files": [{"filename": "../../x.arrow"}]}', "expected _data_files"),
    ("folder/notes.txt", "x", "expected a folder that datasets' save_to_disk wrote"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_text(content)
    with pytest.raises(NaloraError, match=message):
        opened(path.parent if path.parent != tmp_path else path)


def test_an_arrow_file_whose_offsets_lead_elsewhere_is_named(tmp_path):
    write_arrow(tmp_path / "a.arrow", [{"text": "abcd"}, {"text": "efgh"}])
    content = (tmp_path / "a.arrow").read_bytes()
    offsets, elsewhere = (np.asarray([0, 4, last], np.int32).tobytes() for last in (8, 2**30))
    assert content.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(offsets, elsewhere))
    with pytest.raises(NaloraError, match=r"a\.arrow: expected a readable arrow file"):
        open_rows(tmp_path / "a.arrow").read([0, 1])


CODINGS = {
    "long dictionary": (pa.string(), {"dictionary_pagesize_limit": 64}),
    "bytes": (pa.binary(), {"use_dictionary": False}),
    "stored dictionary": (pa.dictionary(pa.int8(), pa.string()), {"use_dictionary": False}),
}


@pytest.mark.parametrize("coding", CODINGS)
def test_parquet_of_any_coding_gives_the_same_rows(tmp_path, coding):
    kind, options = CODINGS[coding]
    text = [None if i % 7 == 0 else f"text {i % 50}" for i in range(300)]
    turns = [[{"role": "user", "content": f"a {i}"}] * (i % 3) for i in range(300)]
    table = pa.table({"text": pa.array(text).cast(kind), "turns": turns, "n": range(300)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=120, **options)
    taken = np.random.default_rng(0).permutation(300)
    assert (
        open_rows(tmp_path / "a.parquet").read(taken.tolist())
        == table.take(pa.array(taken)).to_pylist()
    )
