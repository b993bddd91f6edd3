"""Data and models in buckets: an emulator of Google's store, and a store in memory under the scheme
of S3."""

import io
import json
import os

import fsspec
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from nalora_jax.common import buckets
from nalora_jax.config import DataConfig, MeshConfig
from nalora_jax.data.sources import open_pair, open_source
from nalora_jax.errors import NaloraError
from nalora_jax.mesh.distributed import make_mesh
from nalora_jax.weights.base import load_model
from nalora_jax.weights.hub import resolve_source
from tests import emulator, tiny

RECORDS = [{"prompt": f"q{i}", "completion": f" a{i}"} for i in range(40)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def put(name, content):
    """Uploads an object; returns its URL."""
    return emulator.put(os.environ["STORAGE_EMULATOR_HOST"], name, content)


def opened(name, split="train"):
    return open_source(DataConfig(dataset=name), split)


def test_records_of_a_file_in_a_bucket_are_read_by_index(google):
    url = put("a.jsonl", LINES)
    train, held = open_pair(
        DataConfig(dataset=url, train_split="train[:30]", eval_split="train[30:]")
    )
    assert train.read([29, 0]) == [RECORDS[29], RECORDS[0]]
    assert held[0] == RECORDS[30]
    assert train.where(2).startswith(url)


def test_folders_and_patterns_in_a_bucket_have_their_splits(google):
    for name in ("many/train-0.jsonl", "many/train-1.jsonl", "many/validation/x.jsonl"):
        put(name, LINES)
    put("many/dataset_info.json", b"{}")
    train, held = open_pair(DataConfig(dataset="gs://bucket/many"))
    assert (len(train), len(held)) == (80, 40)
    assert len(opened("gs://bucket/many/train-*.jsonl*2")) == 80
    assert len(opened("x.jsonl", "gs://bucket/many/train-1.jsonl")) == 40


def test_a_copy_is_made_once_and_again_after_the_object_has_changed(google):
    url = put("changing.jsonl", LINES)
    before = opened(url)
    google[1].clear()
    assert opened(url).fingerprint == before.fingerprint
    assert not [path for path, _ in google[1] if "/download/" in path]
    put("changing.jsonl", LINES.replace(b"a39", b"b39"))
    assert opened(url)[39] == {"prompt": "q39", "completion": " b39"}


def test_only_the_row_groups_of_a_parquet_file_that_are_read_are_fetched(google):
    texts = [np.random.default_rng(i).bytes(60_000).hex() for i in range(96)]
    wide = [{"prompt": f"{i}", "completion": f" {text}"} for i, text in enumerate(texts)]
    file, options = io.BytesIO(), {"compression": "none", "use_dictionary": False}
    pq.write_table(pa.Table.from_pylist(wide), file, row_group_size=1, **options)
    url = put("wide.parquet", file.getvalue())
    google[1].clear()
    assert opened(url)[60] == wide[60]
    spans = [span[6:].split("-") for _, span in google[1] if span]
    fetched = sum(int(stop) - int(start) + 1 for start, stop in spans)
    assert 0 < fetched < 0.6 * len(file.getvalue())


@pytest.fixture
def model(tmp_path):
    return tiny.make_model(tmp_path / "model")


def put_model(folder, name):
    for path in folder.iterdir():
        put(f"{name}/{path.name}", path.read_bytes())
    return f"gs://bucket/{name}"


def test_a_model_is_streamed_from_a_bucket_into_the_same_shards(google, model, tmp_path):
    url, mesh = put_model(model, "llama"), make_mesh(MeshConfig(1, 4, 2))
    expected, loaded = (load_model(name, dtype="float32", mesh=mesh) for name in (str(model), url))
    jax.tree.map(np.testing.assert_array_equal, expected.params, loaded.params)
    assert loaded.fingerprint == expected.fingerprint
    assert (loaded.source, loaded.origin.file) == (url, "llama")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_damaged_weights_in_a_bucket_are_refused(google, model):
    url = put_model(model, "damaged")
    put("damaged/model.safetensors", (model / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(
        NaloraError, match="gs://bucket/damaged/model.safetensors: expected a complete saf"
    ):
        load_model(url, dtype="float32")


REFUSED = {
    "gs://bucket/none.jsonl": "none.jsonl.*: expected a file or a folder .*none of that name",
    "gs://private/a.jsonl": "a.jsonl: expected credentials that may read it, found Anonymous .*gcloud auth appl",
    "s3://bucket/a.jsonl": r"a.jsonl: .*pip install s3fs \(or nalora_jax with its extra `s3`\)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_failure_of_a_bucket_is_one_error_with_a_remedy(google, monkeypatch, name):
    def missing(scheme, **_):
        raise ImportError(f"install {scheme}")

    if name.startswith("s3"):
        monkeypatch.setattr(fsspec, "filesystem", missing)
    for action in (opened, resolve_source):
        with pytest.raises(NaloraError, match=f"^{name.rpartition('/')[0]}/{REFUSED[name]}"):
            action(name)


class InMemory(MemoryFileSystem):
    """S3, as far as names and files go."""

    protocol = ("s3",)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("s3://"))


def test_data_and_models_are_read_from_s3_as_from_other_buckets(monkeypatch, model, tmp_path):
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(buckets, "_filesystem_of", lambda scheme: InMemory())
    for path in model.iterdir():
        InMemory().pipe_file(f"s3://bucket/llama/{path.name}", path.read_bytes())
    InMemory().pipe_file("s3://bucket/data/train.jsonl", LINES)
    assert opened("s3://bucket/data")[3] == RECORDS[3]
    streamed, local = (
        load_model(name, dtype="float32") for name in ("s3://bucket/llama", str(model))
    )
    assert streamed.fingerprint == local.fingerprint
