"""Names that can be added to from outside: by a decorator in an imported file, or by an entry point
in a pyproject.

    [project.entry-points."nalora_jax.mechanisms"]
    my_rule = "my_package.my_module"

A file is imported by ``--import`` (`nalora_jax.common.imports`). An entry point is loaded when its
name is asked for and no value of that name has been registered. Loading it registers the name,
because the module that it points to carries the decorator.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from nalora_jax.errors import NaloraError, describe_error

T = TypeVar("T")


class Registry(Generic[T]):
    """Values by name.

    Args:
      kind: the noun for a value in errors, e.g. "mechanism".
      group: group of entry points, e.g. "nalora_jax.mechanisms".
      flag: the setting in errors about unknown names, e.g. "--mechanisms".
      modules: modules of this library by the name that each registers, imported on first use.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        flag: str = "",
        modules: Mapping[str, str] | None = None,
    ) -> None:
        self._kind = kind
        self._group = group
        self.flag = flag
        self._modules = dict(modules or {})
        self._values: dict[str, T] = {}

    def add(self, name: str, value: T, *, replace: bool = False) -> T:
        """Registers ``value`` and returns it.

        Raises:
          NaloraError: the name is taken by another value, and ``replace`` is off.
        """
        existing = self._values.get(name, value)
        is_same = existing is value or _is_redefinition(existing, value)
        if not is_same and not replace:
            raise NaloraError(
                f"{self._kind} {name!r}",
                expected="a name that is free",
                found=repr(existing),
                remedy="choose another name, or pass replace=True",
            )
        self._values[name] = value
        return value

    def decorator(self, name: str) -> Callable[[T], T]:
        """Returns `add` as a decorator."""
        return lambda value: self.add(name, value)

    def get(self, name: str) -> T:
        """Returns the value of ``name``, from an entry point if it is not registered.

        Raises:
          NaloraError: the name is unknown (the message lists those that are known), or its entry
            point fails or registers something else.
        """
        if name not in self._values and not self._load(name):
            files = "none"
            # The module is loaded if files were imported.
            if imports := sys.modules.get("nalora_jax.common.imports"):
                files = ", ".join(map(str, imports.list_imported_files())) or "none"
            way = f"--import FILE registers a {self._kind} of your own"
            raise NaloraError(
                self.flag or self._kind,
                expected=f"one of {', '.join(self.names())}",
                found=repr(name),
                remedy=f"{way} (imported: {files}), or an entry point does",
            )
        return self._values[name]

    def names(self) -> list[str]:
        """Returns all known names, entry points included, sorted."""
        ours = {*self._values, *self._modules}
        return sorted({*ours, *entry_points(group=self._group).names})

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def _load(self, name: str) -> bool:
        """Returns True if a module of this library or an entry point registers the name."""
        if name in self._modules:
            importlib.import_module(self._modules[name])
            return True
        for point in entry_points(group=self._group, name=name):
            where = f"entry point {name} = {point.value!r} of {self._group}"
            try:
                point.load()
            except (Exception, SystemExit) as error:
                # An exit must not look like a finished run.
                raise NaloraError(
                    where,
                    expected="a module that can be imported",
                    found=describe_error(error),
                ) from error
            if name not in self._values:
                raise NaloraError(
                    where,
                    expected=f"to register a {self._kind} of that name",
                    found="no such registration",
                )
        return name in self._values


def _is_redefinition(existing: object, value: object) -> bool:
    """Returns True if both values are definitions of one module and name.

    The module was then executed again, as by an edited notebook cell.
    """
    for attribute in ("__module__", "__qualname__"):
        name = getattr(existing, attribute, None)
        if name is None or name != getattr(value, attribute, None):
            return False
    return True


# ---------------------------------------------------------------- settings in a text


def parse_instance(registry: Registry[Any], text: str) -> Any:
    """Returns an instance of a registered class with the settings in a text.

    The settings are the fields of its dataclass, with the types of their defaults. Tuples are
    written with slashes.

    Args:
      registry: of the classes.
      text: ``"soft"``, ``"soft:power=2,high=3"`` or ``"homogeneity:gains=0.5/0.75/1/1"``.

    Raises:
      NaloraError: an unknown name or setting, or a value of another type.
    """
    name, _, options = text.partition(":")
    cls: Any = registry.get(name)
    return settings_from(cls, options, f"{registry.flag} {text}")


def settings_from(cls: Any, options: str, where: str) -> Any:
    """Returns an instance of a class with the settings of a text, as `parse_instance`.

    Args:
      cls: a dataclass, or a callable without settings.
      options: ``"power=2,high=3"``.
      where: the flag with its value, for errors.

    Raises:
      NaloraError: an unknown setting, or a value of another type.
    """
    defaults = {}
    if dataclasses.is_dataclass(cls):
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    settings = dict[str, Any]()
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if key not in defaults or not equals:
            raise NaloraError(
                where,
                expected=f"NAME:setting=value, with a setting of {', '.join(defaults) or 'none'}",
                found=option,
            )
        default = defaults[key]
        try:
            settings[key] = _convert(value, default)
        except (KeyError, ValueError):
            raise NaloraError(
                where,
                expected=f"{key} of type {type(default).__name__}",
                found=repr(value),
            ) from None
    return cls(**settings)


def _convert(text: str, default: Any) -> Any:
    """Returns the value of ``text``, of the type of ``default``.

    Raises:
      KeyError, ValueError: the text is no value of that type.
    """
    if isinstance(default, bool):
        return {"true": True, "false": False}[text.lower()]
    if isinstance(default, tuple):
        return tuple(type(default[0])(item) for item in text.split("/"))
    return type(default)(text)
