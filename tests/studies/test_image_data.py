"""The image data of the studies, from the packages that carry them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nalora_jax.common import imports
from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.images import opened
from nalora_jax.data.images.files import open_image
from nalora_jax.data.images.opened import open_images
from nalora_jax.errors import NaloraError

HELPER = Path(__file__).parents[2] / "studies" / "image_data.py"
PLAIN = VisionConfig()


@pytest.fixture
def helper(monkeypatch):
    """The globals of studies/image_data.py, whose data sets are registered for one test."""
    monkeypatch.setattr(imports, "_IMPORTED", {})
    monkeypatch.setattr(opened.IMAGE_SETS, "_values", dict(opened.IMAGE_SETS._values))
    imports.import_file(str(HELPER))
    return opened.IMAGE_SETS.get("emoji").__globals__


def test_emoji_is_unknown_without_the_helper() -> None:
    with pytest.raises(
        NaloraError, match=r"--data.dataset: expected a registered data set, .*--import FILE registers"
    ):
        open_images(DataConfig(dataset="emoji"), PLAIN, "train")


@pytest.mark.network
def test_emoji(helper) -> None:
    sizes = {}
    for split in ("train", "validation", "test"):
        source = open_images(DataConfig(dataset="emoji"), PLAIN, split)
        sizes[split] = len(source)
        labels = source.labels(source.classes())
        assert len(source.classes()) == 10
        assert len(set(labels.tolist())) >= 9
        for index, record in zip(
            range(0, len(source), 97), source.read(range(0, len(source), 97)), strict=True
        ):
            assert open_image(source.image(record, source.where(index))).size == (64, 64)
        assert all(caption == caption.lower() for caption in source.captions(range(20)))
    assert sum(sizes.values()) == 1911
    assert 1250 < sizes["train"] < 1430
    fine = open_images(DataConfig(dataset="emoji"), VisionConfig(label_field="subcategory"), "train")
    assert "face-smiling" in fine.classes()
