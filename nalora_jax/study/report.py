"""Tables and pictures of a study, from its records alone."""

from __future__ import annotations

from pathlib import Path

from nalora_jax.errors import NaloraError
from nalora_jax.files import write_atomically
from nalora_jax.study.pictures import draw
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.records import Records
from nalora_jax.study.tables import render

TABLES = "results.md"
PICTURES = "pictures"


def write_report(protocol: Protocol) -> list[Path]:
    """Writes ``results.md`` and ``pictures/*.svg`` beside the protocol, over earlier ones; returns their paths.

    Raises:
      NaloraError: there is no record yet, or the record file is damaged.
    """
    records = Records(protocol.folder)
    found = records.read()
    if not found:
        remedy = f"run it first: nalora study run {protocol.folder}"
        raise NaloraError(str(records.path), expected="records of finished runs", found="none", remedy=remedy)
    drawn = draw(protocol, found)
    text = render(protocol, found)
    if drawn:
        shown = "\n\n".join(f"![{name.removesuffix('.svg').replace('_', ' ')}]({PICTURES}/{name})" for name in drawn)
        text += f"\n## Pictures\n\n{shown}\n"
    folder = protocol.folder / PICTURES
    folder.mkdir(exist_ok=True)
    written = [protocol.folder / TABLES, *(folder / name for name in drawn)]
    for path, content in zip(written, [text, *drawn.values()], strict=True):
        write_atomically(path, content)
    return written
