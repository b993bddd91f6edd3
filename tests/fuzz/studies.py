"""Readers of studies: their protocol and their records."""

from __future__ import annotations

import shutil
from pathlib import Path

from nalora_jax.study.protocol import read_protocol
from nalora_jax.study.report import status

# The smallest study of the repository, with enough of its records to have a rate chosen.
STUDY = Path(__file__).parents[2] / "studies" / "emoji_alignment"
RECORDS = 20


def write_study(folder: Path) -> None:
    shutil.copy(STUDY / "protocol.toml", folder)
    lines = (STUDY / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[:RECORDS]))


def use_study(folder: Path) -> None:
    status(read_protocol(folder))
