"""Signatures of the generator's methods that list the fields of `Settings` as keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def with_options(settings: type) -> Callable[[Function], Function]:
    """Returns a decorator that replaces ``**settings`` in a signature by the fields of a dataclass."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        keyword = inspect.Parameter.KEYWORD_ONLY
        options = [
            inspect.Parameter(option.name, keyword, default=option.default, annotation=option.type)
            for option in fields(settings)
        ]
        function.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
        return function

    return decorate
