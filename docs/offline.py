"""Hook of MkDocs: pages load no script from another server."""

from __future__ import annotations

from typing import Any

from mkdocs.utils import get_relative_url

# Material's, for search from a folder; `worker.js` does the same.
SHIM = "https://unpkg.com/iframe-worker/shim"


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Replaces the script that starts workers from file:// by the site's own."""
    del config
    return output.replace(SHIM, get_relative_url("worker.js", page.url))
