"""Small pictures in folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def picture_folder(tmp_path: Path) -> Callable[..., Path]:
    """``picture_folder(cat=3, dog=5)`` makes so many pictures in a subfolder for each name."""

    def make(**counts: int) -> Path:
        folder = tmp_path / "pictures"
        for number, (name, count) in enumerate(counts.items()):
            (folder / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(100 * number + i).integers(
                    0, 256, (10 + i, 14, 3), dtype=np.uint8
                )
                Image.fromarray(pixels).save(folder / name / f"{i}.png")
        return folder

    return make
