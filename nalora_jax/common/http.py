"""Requests to servers over HTTP, with a body in JSON."""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any


def request(url: str, body: Any = None, *, timeout: float) -> bytes:
    """Returns the body of an answer: to GET without a body, otherwise to POST of JSON.

    A key is read from ``OPENAI_API_KEY``. ``timeout`` is the limit of each read, in seconds.

    Raises:
      urllib.error.HTTPError: the server answers with a status of 400 or above.
      OSError, http.client.HTTPException: it cannot be reached, or the answer is cut off.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None
    if body is not None:
        data = json.dumps(body).encode()
    asked = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(asked, timeout=timeout) as answer:
        content: bytes = answer.read()
    return content
