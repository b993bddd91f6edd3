"""Typed access to a parsed ``config.json``: each value is checked once; errors name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nalora_jax.errors import NaloraError, abbreviate

# Fields in which null has a meaning: no dropout, cap or window, no low-rank queries, or as many
# heads as for queries; for the base wavelength it means the default.
_NULL_MEANS = {"attention_dropout", "attn_logit_softcapping", "final_logit_softcapping"}
_NULL_MEANS |= {"num_key_value_heads", "q_lora_rank", "rope_theta", "sliding_window"}
_LARGEST = 1e30  # limit of `Fields.number`, within the range of float32


class Fields:
    """Reader for the fields of one family; an absent field has the family's default.

    JSON's null differs from absence: in the fields where transformers supports it, it switches the
    feature off; in other fields with a default it raises an error. Without a default both mean the
    same.

    Args:
      raw: the parsed file.
      defaults: transformers' default for each absent field.
      where: the file's name, for messages.
    """

    def __init__(
        self, raw: Mapping[str, Any], defaults: Mapping[str, Any], where: str
    ) -> None:
        """Stores the arguments, which the class describes."""
        self.raw = raw
        self.defaults = defaults
        self.where = where

    def get(self, name: str) -> Any:
        """Returns the value of a field, its default if it is absent, or None without a default.

        Raises:
          NaloraError: the field is null, has a default, and null has no meaning in it.
        """
        value = self.raw.get(name)
        if value is not None or name not in self.defaults:
            return value
        default = self.defaults[name]
        # For RoPE's base wavelength null means the default, too.
        if name not in self.raw or name == "rope_theta":
            return default
        if name in _NULL_MEANS:
            return None
        remedy = f"leave the field out for the family's default, {default!r}"
        raise self.error(name, "a value", "null", remedy)

    def error(
        self, name: str, expected: object, found: object, remedy: str = ""
    ) -> NaloraError:
        """Returns an error about the field ``name``, whose value should be ``expected``."""
        return NaloraError(
            f"{self.where}: {name}", expected=expected, found=found, remedy=remedy
        )

    def integer(
        self, name: str, *, low: int = 1, high: int = 2**24, default: int | None = None
    ) -> int:
        """Returns a whole number from ``low`` to ``high``; ``default`` if it is absent or null.

        A float such as 2.0 becomes an integer.

        Raises:
          NaloraError: it is another value.
        """
        value = self.get(name)
        if value is None:
            value = default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or not low <= value <= high:
            raise self.error(
                name, f"a whole number from {low} to {high}", abbreviate(value)
            )
        return int(value)

    def number(
        self, name: str, *, default: float | None = None, zero: bool = False
    ) -> float:
        """Returns a finite number; ``default`` if it is absent or null.

        It is above 0, or with ``zero`` 0 or more.

        Raises:
          NaloraError: it is another value.
        """
        value = self.get(name)
        if value is None:
            value = default
        expected = "a finite number above 0"
        if zero:
            expected = "a finite number of 0 or more"
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        in_range = is_number and 0 <= value <= _LARGEST  # false for NaN, too
        if in_range and (zero or value != 0):
            return float(value)
        raise self.error(name, expected, abbreviate(value))

    def flag(self, name: str) -> bool:
        """Returns true or false; false if absent."""
        value = self.get(name)
        if not isinstance(value, bool | None):
            raise self.error(name, "true or false", repr(value))
        return bool(value)

    def text(self, name: str) -> str:
        """Returns a string."""
        value = self.get(name)
        if not isinstance(value, str):
            raise self.error(name, "a string", abbreviate(value))
        return value

    def items(
        self,
        name: str,
        length: int,
        kinds: type | tuple[type, ...],
        *,
        longer: bool = False,
    ) -> list[Any] | None:
        """Returns a list of ``length`` items of the types ``kinds``; None if it is absent or null.

        With ``longer``, the list in the file may be longer; its first items are returned.

        Raises:
          NaloraError: it is another value.
        """
        value = self.get(name)
        if value is None:
            return None
        fits = isinstance(value, list) and len(value) >= length
        if fits and not longer:
            fits = len(value) == length
        if not fits or not all(isinstance(item, kinds) for item in value):
            found = f"{type(value).__name__} {str(value)[:60]}"
            raise self.error(name, f"a list of {length} entries", found)
        return list(value[:length])

    def mapping(self, name: str) -> dict[str, Any]:
        """Returns a JSON object; empty if absent."""
        value = self.get(name)
        if not isinstance(value, Mapping | None):
            raise self.error(name, "a JSON object", repr(value)[:60])
        return dict(value or {})

    def refuse(self, name: str, remedy: str = "") -> None:
        """Raises an error if the file asks for the feature ``name``, which is not implemented."""
        value = self.get(name)
        if value not in (None, False, 0, [], {}, ""):
            raise self.error(
                name, "nothing: this is not implemented", repr(value)[:60], remedy
            )
