"""Records refusals in the processes that tests start, as ``tests/conftest.py`` does in those of pytest.

Python imports a module of this name when it starts, if its folder is on PYTHONPATH (`tests.tiny.start`). The package is
not imported by it: the errors are wrapped when the process imports them itself.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Loader(importlib.abc.Loader):
    """Executes `nalora_jax.errors`, and then wraps its class."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        from tests import refusals

        refusals.record(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "nalora_jax.errors":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


if "NALORA_TEST_REFUSALS" in os.environ:
    sys.meta_path.insert(0, _Finder())
