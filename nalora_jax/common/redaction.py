"""Redacts passwords and private paths of a run, and escapes names in Markdown.

`redact` is for error lines and all files of a run (log, checkpoints, report, trackers),
`redact_private` for model cards, which others read, and `markdown` and `code` for texts in
Markdown, which would otherwise pass HTML through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nalora_jax.errors import visible

REDACTED = "***"  # in place of a password or token
_SECRET = (
    r"(?:password|passwd|pwd|secret|token|(?:api|access|private)[_-]?key"
    r"|credentials?|signature|sig)"
)
_NAMED = re.compile(rf"(?i){_SECRET}$")
# password=x, --password x, Bearer x
_ASSIGNED = re.compile(
    rf"(?i)({_SECRET}=|--[\w.-]{{0,60}}{_SECRET}[ ]+(?!-)|\bbearer[ ]+(?=\S{{8}}))"
    r"(?:\"[^\"]*\"|'[^']*'|[^\s,;&\"']+)"
)
# scheme://user:password@host; the user may be a token, and a secret of AWS may contain slashes.
_USER = re.compile(
    r"(?<=://)(?:[^/\s\"',]*|[^/\s\"',@]{1,200}:(?!\d+/)[^\s\"',@]{1,200})@"
)
# Tokens by their form: Hugging Face, GitHub, GitLab, AWS, Google, OpenAI, Slack, JSON Web Tokens.
_TOKEN = re.compile(
    r"\b(?:hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|gl[a-z]{2,6}-[\w-]{20,}"
    r"|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{35}"
    r"|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,}|eyJ[\w-]{8,2000}\.[\w-]{8,4000}(?:\.[\w-]+)?)"
)
# The folders of an absolute path, or of one in the home or working folder, also as a URL
# (file:///, sqlite:///).
_PART = r"[^\s/\\,;:*\"'<>|]"
_FOLDERS = re.compile(
    r"(?<![\w:/\\.)])(?:[a-z+]{1,20}:/{2,3}(?=/)|~[\w.-]*|\.{1,2}|[A-Z]:(?=\\))?"
    rf"(?:[/\\]{_PART}+)*[/\\](?={_PART})"
)
# Folders with spaces.
_QUOTED = re.compile(
    r"(?<=[\"'])(?:~[\w.-]*|\.{1,2})?[/\\][^\"']*[/\\](?=[^\"'/\\]+[\"'])"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Settings that may be paths.
_PATHS = (
    "model",
    "adapter",
    "output",
    "dataset",
    "data_dir",
    "train_split",
    "eval_split",
)
_PATTERNS = ("rules", "rates", "mechanisms")  # settings with slashes that are not paths
# Characters with a meaning in Markdown or HTML. An underscore within a word has none.
_SPECIAL = re.compile(r"([\\`*\[\]<>#~&]|(?<![^\W_])_|_(?![^\W_]))")


def redact(value: Any) -> Any:
    """Returns nested settings or a text with `REDACTED` in place of passwords and tokens.

    Example:
      >>> redact({"callbacks": ("mlflow:uri=https://me:pass@host/x",)})
      {'callbacks': ('mlflow:uri=https://***@host/x',)}
    """
    if isinstance(value, Mapping):
        settings = {}
        for name, setting in value.items():
            if isinstance(setting, str) and setting and _NAMED.search(str(name)):
                settings[name] = REDACTED
            else:
                settings[name] = redact(setting)
        return settings
    if isinstance(value, list | tuple):
        return type(value)(map(redact, value))
    if not isinstance(value, str):
        return value
    text = _USER.sub(f"{REDACTED}@", value)
    text = _ASSIGNED.sub(rf"\g<1>{REDACTED}", text)
    return _TOKEN.sub(REDACTED, text)


def redact_private(value: Any, name: str = "") -> Any:
    """Returns settings or a text without passwords, tokens and private folders.

    Of a path the last part remains.

    Args:
      value: nested settings, or a text such as a command.
      name: of the setting.

    Example:
      >>> redact_private({"train_split": "/home/me/a project/x.jsonl", "model": "owner/model"})
      {'train_split': 'x.jsonl', 'model': 'owner/model'}
    """
    value = redact(value)
    if isinstance(value, Mapping):
        return {name: redact_private(member, name) for name, member in value.items()}
    if name in _PATTERNS:
        return value
    if isinstance(value, list | tuple):
        return type(value)(redact_private(member, name) for member in value)
    if not isinstance(value, str):
        return value
    if name in _PATHS:
        return ",".join(map(_shorten, value.split(",")))
    return _FOLDERS.sub("", _QUOTED.sub("", value))


def _shorten(name: str) -> str:
    """Returns a hub id or a data set's name unchanged, and a path's last part."""
    if name.startswith(("hf:", "tfds:")) or is_hub_id(name):
        return name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def is_hub_id(name: str) -> bool:
    """Returns True for ``owner/name``, unless a file has that name."""
    try:
        return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    except OSError:  # a name that no file system takes
        return True


def markdown(text: object) -> str:
    """Returns a text for a line of Markdown, with Markdown's and HTML's characters escaped."""
    return _SPECIAL.sub(r"\\\1", _line(text))


def fence_around(text: str, shortest: str = "`") -> str:
    """Returns backticks, at least ``shortest``, that are more than any run of them in ``text``."""
    fence = shortest
    while fence in text:
        fence += "`"
    return fence


def code(text: object) -> str:
    """Returns a text as Markdown's inline code."""
    line = _line(text)
    fence = fence_around(line)
    if line.startswith("`") or line.endswith("`"):
        line = f" {line} "
    return f"{fence}{line}{fence}"


def _line(text: object) -> str:
    """Returns a text on one line, without control characters."""
    return visible(" ".join(str(text).split()))
