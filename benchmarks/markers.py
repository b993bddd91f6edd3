"""Generated parts of hand-written pages, between two markers.

Imports no other module of this folder: the tests' own pages (``tests.faults``, ``tests.fuzz``) are written with it too,
and for them this folder is not on the import path.
"""

from __future__ import annotations

from pathlib import Path


def write_between(page: Path, start: str, end: str, content: str) -> None:
    """Replaces what stands between two markers of a page."""
    before, rest = page.read_text().split(start)
    _, after = rest.split(end)
    page.write_text(f"{before}{start}\n{content}\n{end}{after}")
