"""What is said of a base model's weights: their file, number formats, and a digest of every one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nalora_jax.models.config import ModelConfig
from nalora_jax.weights import origin
from nalora_jax.weights.base import load_model
from nalora_jax.weights.hf import SafetensorsFolder
from nalora_jax.weights.origin import fingerprint, number_formats
from tests.weights.folders import RAW, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path)
    return tmp_path


def digest(folder: Path) -> str:
    return fingerprint(ModelConfig.from_hf(RAW), SafetensorsFolder(folder))


def test_the_digest_covers_every_weight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped bit anywhere in the file's data changes it."""
    monkeypatch.setattr(origin, "_CHUNK", 1000)
    first, path = digest(folder), folder / "model.safetensors"
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    seen = {first}
    for at in np.linspace(start, len(good) - 1, 40, dtype=int):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        seen.add(digest(folder))
    assert len(seen) == 41
    path.write_bytes(good)
    assert digest(folder) == first


def test_processes_share_the_hashing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = digest(folder)
    config, source, parts = ModelConfig.from_hf(RAW), SafetensorsFolder(folder), []
    monkeypatch.setattr(origin.jax, "process_count", lambda: 3)
    for gather in (lambda mine: parts.append(mine) or np.stack([mine]), lambda _: np.stack(parts)):
        monkeypatch.setattr(origin.multihost_utils, "process_allgather", gather)
        for index in range(3):
            monkeypatch.setattr(origin.jax, "process_index", lambda index=index: index)
            found = fingerprint(config, source, together=True)
    assert found == alone
    read = [int((part != 0).any(axis=1).sum()) for part in parts]
    assert max(read) < sum(read) == len(parts[0])


def test_a_model_knows_its_file_formats_and_digest(folder: Path) -> None:
    model = load_model(str(folder), dtype="bfloat16")
    assert model.origin is not None
    assert model.origin.to_dict() == {
        "name": str(folder),
        "file": folder.name,
        "format": "safetensors",
        "numbers": "F32",
        "fingerprint": digest(folder),
        "copy_of": "",
    }
    assert (model.source, model.fingerprint) == (model.origin.name, model.origin.fingerprint)
    said = model.origin.describe()
    assert all(part in said for part in (folder.name, "safetensors", "F32", model.fingerprint[:12]))


def test_number_formats_are_named_by_their_share(folder: Path) -> None:
    whole = digest(folder)
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    half = {name: t.astype(ml_dtypes.bfloat16) if "mlp" in name else t for name, t in tensors.items()}
    save_file(half, folder / "model.safetensors")
    total, mlp = (sum(t.size for n, t in tensors.items() if word in n) for word in ("", "mlp"))
    share = mlp / total
    assert number_formats(SafetensorsFolder(folder)) == f"BF16 ({share:.0%}), F32 ({1 - share:.0%})"
    assert digest(folder) != whole
