"""Tables and pictures of a study, computed from its records."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from nalora_jax.common.files import make_unlinked_folder, write_atomically
from nalora_jax.errors import NaloraError
from nalora_jax.study.identity import describe_old
from nalora_jax.study.pictures import draw
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.provenance import checked_records
from nalora_jax.study.records import Records
from nalora_jax.study.tables import render

log = logging.getLogger(__name__)

TABLES = "results.md"
PICTURES = "pictures"
_OURS = re.compile(r"(loss_by_rate|loss_by_step|misalignment|importance|differences(_\d+)?)\.svg")


def write_report(protocol: Protocol) -> list[Path]:
    """Writes ``results.md`` and ``pictures/*.svg`` to the protocol's folder; returns their paths.

    Raises:
      NaloraError: there is no record, the file is damaged, or records or protocol changed.
    """
    store = Records(protocol.folder)
    records = checked_records(protocol, store)
    if not records:
        remedy = f"run it first: nalora study run {protocol.folder}"
        raise NaloraError(str(store.path), expected="records of finished runs", found="none", remedy=remedy)
    if note := describe_old(records):
        log.info("%s", note)
    drawn = draw(protocol, records)
    text = render(protocol, records)
    if drawn:
        links = "\n\n".join(
            f"![{name.removesuffix('.svg').replace('_', ' ')}]({PICTURES}/{name})" for name in drawn
        )
        text += f"\n## Pictures\n\n{links}\n"
    folder = make_unlinked_folder(protocol.folder / PICTURES)
    for path in folder.glob("*.svg"):
        if _OURS.fullmatch(path.name) and path.name not in drawn:  # of an earlier report
            path.unlink()
    written = [protocol.folder / TABLES, *(folder / name for name in drawn)]
    for path, content in zip(written, [text, *drawn.values()], strict=True):
        write_atomically(path, content)
    return written
