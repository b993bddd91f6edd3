"""Settings recorded in a run's folder, checked on reading: files may have been edited."""

from __future__ import annotations

import reprlib
from typing import Any

from nalora_jax.config import RunConfig, config_from_dict
from nalora_jax.config.types import first_wrong, type_name
from nalora_jax.errors import NaloraError


def recorded_config(settings: Any, where: str) -> RunConfig:
    """Returns the config whose `RunConfig.to_dict` a run wrote; ignores unknown fields.

    Args:
      settings: parsed JSON, of any content.
      where: file and field, for the message.

    Raises:
      NaloraError: it is not a run's config, for example because the line was edited.
    """
    try:
        if not isinstance(settings, dict):
            raise TypeError(f"a {type(settings).__name__}")
        config = config_from_dict(settings)
        if (wrong := first_wrong(config)) is not None:
            raise TypeError(
                f"{wrong.field} = {reprlib.repr(wrong.value)}, which is no {type_name(wrong.hint)}"
            )
    except (AttributeError, TypeError, ValueError) as error:
        raise NaloraError(
            where,
            expected="the settings that a run writes",
            found=error,
            remedy="the file was edited or damaged: restore that line",
        ) from error
    return config
