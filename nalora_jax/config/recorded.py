"""Settings that a run has written into its folder: checked when they are read, since somebody may have edited them."""

from __future__ import annotations

import reprlib
from typing import Any

from nalora_jax.config import RunConfig, config_from_dict
from nalora_jax.config.types import first_wrong, type_name
from nalora_jax.errors import NaloraError


def recorded_config(settings: Any, where: str) -> RunConfig:
    """The config whose `RunConfig.to_dict` a run wrote; fields that this version does not know are ignored.

    Args:
      settings: parsed JSON, of any content.
      where: file and field, for the message.

    Raises:
      NaloraError: it is no run's config, e.g. because somebody edited the line.
    """
    try:
        if not isinstance(settings, dict):
            raise TypeError(f"a {type(settings).__name__}")
        config = config_from_dict(settings)
        if (wrong := first_wrong(config)) is not None:
            raise TypeError(f"{wrong.field} = {reprlib.repr(wrong.value)}, which is no {type_name(wrong.hint)}")
    except (AttributeError, TypeError, ValueError) as error:
        raise NaloraError(
            where,
            expected="the settings that a run writes",
            found=error,
            remedy="the file was edited or damaged: restore that line",
        ) from error
    return config
