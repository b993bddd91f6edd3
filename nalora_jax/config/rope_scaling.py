"""Text form of RoPE scaling, ``TYPE:field=value,...``, with the names of transformers."""

from __future__ import annotations

import json
from typing import Any

from nalora_jax.errors import NaloraError

FLAG = "--model.rope-scaling"
ORIGINAL = "original_max_position_embeddings"
# Fields of each type in ``rope_parameters``, besides `ORIGINAL`.
_OF_YARN = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)
FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", *_OF_YARN),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# Types whose frequencies depend on the original context length.
WITH_ORIGINAL = ("yarn", "llama3")


def parse_rope_scaling(text: str) -> dict[str, Any]:
    """Returns the ``rope_parameters`` of a RoPE scaling ``TYPE:field=value,...``.

    Example:
      >>> parse_rope_scaling("yarn:factor=4,beta_fast=16")
      {'rope_type': 'yarn', 'factor': 4.0, 'beta_fast': 16.0}

    Raises:
      NaloraError: an unknown type or field, a field without a number, or no factor.
    """
    kind, _, listed = text.partition(":")
    if kind not in FIELDS:
        found = repr(text)
        raise NaloraError(
            FLAG,
            expected=f"TYPE:factor=N, with a type of {', '.join(FIELDS)}",
            found=found,
        )
    names = [*FIELDS[kind]]
    if kind in WITH_ORIGINAL:
        names.append(ORIGINAL)
    values: dict[str, Any] = {}
    for field in filter(None, listed.split(",")):
        name, _, value = field.partition("=")
        if name not in names:
            raise NaloraError(
                f"{FLAG} {text}",
                expected=f"fields of {', '.join(names)}",
                found=repr(field),
            )
        values[name] = _value(name, value, text)
    if "factor" not in values:
        raise NaloraError(
            f"{FLAG} {text}", expected=f"a factor, as in {kind}:factor=4", found="none"
        )
    return {"rope_type": kind, **values}


def _value(name: str, text: str, where: str) -> bool | int | float:
    """Returns the value of a field with its type in transformers.

    Args:
      name: the field.
      text: its value, as JSON: a number, or true or false.
      where: the whole scaling, for messages.

    Raises:
      NaloraError: a value of another type, or out of the range [0, 2^30).
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if name == "truncate" and isinstance(value, bool):
        return value
    kind: Any = int | float
    if name == ORIGINAL:
        kind = int
    # In Python, True is an int.
    fits = isinstance(value, kind) and not isinstance(value, bool)
    # A boolean "truncate" was returned above, so here it has another type.
    if name == "truncate" or not fits or not 0 <= value < 2**30:
        special = {"truncate": "true or false", ORIGINAL: "a whole number of tokens"}
        expected = f"{special.get(name, 'a number of 0 or more')} as {name}"
        raise NaloraError(f"{FLAG} {where}", expected=expected, found=repr(text[:40]))
    if name == ORIGINAL:
        return value
    return float(value)
