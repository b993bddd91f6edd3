"""Generated parts of hand-written pages, between two markers.

It imports no other module of this folder, because the pages of tests (``tests.faults``,
``tests.fuzz``) use it without this folder on the import path.
"""

from __future__ import annotations

from pathlib import Path


def write_between(page: Path, start: str, end: str, content: str) -> None:
    """Replaces the text between two markers of a page."""
    before, following = page.read_text().split(start)
    _, after = following.split(end)
    page.write_text(f"{before}{start}\n{content}\n{end}{after}")
