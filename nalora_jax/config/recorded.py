"""Settings that a run has written into its folder: checked when they are read, since somebody may have edited them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from nalora_jax.config import RunConfig, config_from_dict
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
        _check_types(config)
    except (AttributeError, TypeError, ValueError, TypeCheckError) as error:
        raise NaloraError(
            where,
            expected="the settings that a run writes",
            found=error,
            remedy="the file was edited or damaged: restore that line",
        ) from error
    return config


def _check_types(config: Any) -> None:
    """Raises a TypeCheckError unless every field of the nested dataclasses has its declared type."""
    hints = get_type_hints(type(config))
    for one in fields(config):
        value = getattr(config, one.name)
        check_type(value, hints[one.name], collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        for part in value if isinstance(value, tuple) else (value,):
            if is_dataclass(part):
                _check_types(part)
