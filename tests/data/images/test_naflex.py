"""LFM2-VL's images against transformers 5.25, whose processors of this family need torchvision.

`lfm2_vl.json` has, for the pictures of noise of `test_processors.py`, rows and columns of patches of
each tile, the text with repeats as factors, and some pixels as grey levels.
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nalora_jax.data.chat_templates import SizedImageTokens
from nalora_jax.data.images.image_files import read_processor
from nalora_jax.data.images.patches import NaflexProcessor
from nalora_jax.weights.base import IMAGE_TEXTS
from tests.data.images.test_processors import draw

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "lfm2_vl.json").read_text())


def read_case(folder: Path, name: str) -> NaflexProcessor:
    settings = {"image_processor_type": "Lfm2VlImageProcessor"} | CASES[name]["settings"]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = read_processor(folder)
    assert isinstance(processor, NaflexProcessor)
    return processor


@pytest.mark.parametrize("name", CASES)
def test_tiles_and_texts_are_those_of_transformers(name, tmp_path) -> None:
    processor = read_case(tmp_path, name)
    tokens = SizedImageTokens(
        "<image>", 4, 0, "<image>", processor=processor, **IMAGE_TEXTS["lfm2_vl"]
    )
    for (width, height), grids, text in CASES[name]["images"]:
        prepared = processor.prepare(Image.fromarray(draw(width, height)))
        assert [list(grid) for grid in prepared.grids] == grids, (width, height)
        (layout,) = processor.layouts([(height, width)])
        assert layout == prepared.layout
        assert processor.views_of(layout) == len(grids)
        expected = ""
        for run in text.split():
            word, _, repeats = run.partition("*")
            expected += word * int(repeats or 1)
        assert tokens.text_of(layout) == expected, (width, height)


@pytest.mark.parametrize("name", ["tiles", "whole"])
def test_pixels_differ_by_the_rounding_of_torchvision(name, tmp_path) -> None:
    """By one grey level, as Pillow and torchvision resample with other rounding."""
    processor = read_case(tmp_path, name)
    for size, packed in CASES[name]["pixels"].items():
        prepared = processor.prepare(Image.fromarray(draw(*map(int, size.split("x")))))
        expected = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8)
        expected = expected.reshape(prepared.pixels.shape)
        start = 0
        for rows, columns in prepared.grids:
            end = start + rows * columns
            squares = prepared.pixels[start:end].reshape(rows // 2, columns // 2, 2, 2, -1)
            ours = squares.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
            difference = np.abs(ours.astype(int) - expected[start:end])
            assert difference.max() <= 1, size
            start = end
