"""The tables of docs/from_peft.md and docs/from_trl.md, from the fields that the package converts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nalora_jax.weights.foreign_settings import Field, Refused


def table_of(fields: Mapping[str, Field]) -> Iterator[str]:
    """Yields the rows of a Markdown table: their field, our setting, and a note."""
    yield "| field | here | |"
    yield "|---|---|---|"
    for name, field in fields.items():
        if field.ours:
            here = f"`{field.ours}`"
        elif field.ignored:
            here = "left out"
        else:
            refusal = field.value(object())  # a value that is accepted nowhere
            here = "the same"
            if isinstance(refusal, Refused):
                here = f"refused: {refusal.reason}"
        yield f"| `{name}` | {here} | {field.note} |"
