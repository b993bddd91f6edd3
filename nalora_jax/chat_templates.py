"""The chat templates of a Hugging Face folder: the default, and one for chats with tools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.tokenizer import Tokenizer

DEFAULT_FILE = "chat_template.jinja"
TOOL_FILE = "additional_chat_templates/tool_use.jinja"
PROCESSOR_FILE = "chat_template.json"  # of multimodal models, as their processors saved it


def read_templates(folder: Path, *settings: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Returns the default template and the template ``tool_use``; None for missing ones.

    Template files come first, then the first of ``settings`` with a ``chat_template`` (one text,
    or several by name), as in transformers.

    Args:
      folder: of the tokenizer.
      *settings: the folder's JSON files that may hold templates.

    Raises:
      NaloraError: a template's file cannot be read.
    """
    files = {"default": _read(folder / DEFAULT_FILE), "tool_use": _read(folder / TOOL_FILE)}
    places = [files, *(_by_name(each.get("chat_template")) for each in settings)]
    named = next((place for place in places if any(place.values())), files)
    return named.get("default"), named.get("tool_use")


def write_templates(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the templates of ``tokenizer`` as files."""
    for name, template in (
        (DEFAULT_FILE, tokenizer.chat_template),
        (TOOL_FILE, tokenizer.tool_template),
    ):
        if template is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(template, encoding="utf-8")


def has_templates(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Returns True if a folder has a template in any of the places that `read_templates` reads."""
    files = (DEFAULT_FILE, TOOL_FILE, PROCESSOR_FILE)
    return "chat_template" in settings or any((folder / name).is_file() for name in files)


def _read(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "download the file again"
        raise NaloraError(str(path), expected="a chat template", found=error, remedy=remedy) from error


def _by_name(value: Any) -> dict[str, str | None]:
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if not isinstance(value, dict):
        value = {"default": value}
    return {name: text for name, text in value.items() if isinstance(text, str)}
