"""Executes the user's Python files first; they register rules, activations, families, sources.

A file is recorded with the first digits of its digest, ``my_rule.py@3f2a9c0d5e11``: settings name
the executed content, and a resumed run rejects a file whose content has changed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from nalora_jax.common.digests import digest_of
from nalora_jax.common.files import expand_user
from nalora_jax.errors import NaloraError, describe_error

_DIGITS = 12
_RECORDED = re.compile(r"(.+)@([0-9a-f]+)")  # a path, which may have an @, and a digest


@dataclass(frozen=True)
class ImportedFile:
    """A file that was executed.

    Attributes:
      path: as it was named.
      digest: SHA-256 of its content, in hexadecimal.
    """

    path: str
    digest: str

    def __str__(self) -> str:
        return f"{self.path}@{self.digest[:_DIGITS]}"


def installed_version(name: str) -> str:
    """Returns the version of an installed distribution, or ``not installed``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # also this library, if it is a checkout
        return "not installed"


_IMPORTED: dict[Path, ImportedFile] = {}


def list_imported_files() -> list[ImportedFile]:
    """Returns the files that this process has imported, in their order."""
    return list(_IMPORTED.values())


def import_file(name: str, folder: str | Path = ".") -> ImportedFile:
    """Executes a Python file, once in a process.

    Args:
      name: its path, relative to ``folder``; with ``@`` and a digest, as recorded, only if its
        content has that digest.
      folder: of the study or the working directory.

    Raises:
      NaloraError: there is no such file, it fails, its content differs from the recorded digest,
        or it changed after this process imported it.
    """
    where = f"--import {name}"
    path_text = name
    recorded_digest = ""
    if recorded := _RECORDED.fullmatch(name):
        path_text, recorded_digest = recorded.groups()
    # Not Path.resolve, which raises an error for a link to itself.
    path = Path(os.path.realpath(expand_user(folder) / expand_user(path_text)))
    try:
        digest = digest_of(path.read_bytes())
    except (OSError, ValueError) as error:
        raise NaloraError(
            where,
            expected="a Python file that can be read",
            found=getattr(error, "strerror", None) or error,
        ) from error
    imported_file = _IMPORTED.get(path)
    expected = recorded_digest
    if imported_file is not None and not recorded_digest:
        expected = imported_file.digest
    if not digest.startswith(expected):
        raise NaloraError(
            where,
            expected=f"content with SHA-256 {expected[:_DIGITS]}",
            found=digest[:_DIGITS],
            remedy="restore the file, or start a new run",
        )
    if imported_file is None:
        imported_file = ImportedFile(path_text, digest)
        module = f"nalora_import_{path.stem}_{digest[:_DIGITS]}"
        execute_file(path, module, where)
        _IMPORTED[path] = imported_file
    return imported_file


def import_files(names: Sequence[str], folder: str | Path = ".") -> tuple[str, ...]:
    """Executes Python files in their order, as `import_file` does.

    Returns:
      Each file's path with the digest of its content, as runs record it.
    """
    return tuple(str(import_file(name, folder)) for name in names)


def execute_file(path: Path, name: str, where: str) -> ModuleType:
    """Executes a Python file as the module ``name``, and returns it; ``where`` names it in errors.

    Raises:
      NaloraError: it is no Python file, or it fails.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise NaloraError(
            where,
            expected="a Python file, with a name that ends in .py",
            found=path.name,
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    # Leave no cache next to the user's file.
    write_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, NaloraError | KeyboardInterrupt):
            raise
        reason = describe_error(error)  # also of a file that ends the program
        raise NaloraError(
            where, expected="a Python file that can be executed", found=reason
        ) from error
    finally:
        sys.dont_write_bytecode = write_bytecode
    return module
