"""Hugging Face folders: config.json, and the tensors of one or several safetensors files.

Only safetensors is read. ``.bin`` and ``.pt`` files are pickles, which run code of their author's when they are opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from nalora_jax.errors import NaloraError
from nalora_jax.tokenizer import read_json
from nalora_jax.weights.load import Index

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = ("BF16", "F16", "F32")
_SAMPLED_ROWS = 4
_SAMPLED_COLUMNS = 1024
_MAX_MAPPED = 16 << 20  # bytes
_NEIGHBOURS = 1 << 20  # bytes that a system may map with those that are asked for


@dataclass(frozen=True)
class _Stored:
    """One tensor as a file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFolder:
    """The tensors of a folder, as a `TensorSource`.

    Raises:
      NaloraError: no safetensors file, or several without an index; a damaged or truncated file; an index that names a
        missing file or a tensor that its file does not hold.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file: tuple[Path, Any] | None = None  # the one that is open
        self._mapped = 0  # bytes of it in memory
        self._tensors = self._read_headers()

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.folder)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self._tensors.items()}

    def check_readable(self, name: str) -> None:
        """Refuses what is not a bf16, f16 or f32 tensor."""
        stored = self._tensors[name]
        if stored.dtype not in _FLOATS:
            raise NaloraError(
                f"{stored.file}: {name}",
                expected=f"one of {', '.join(_FLOATS)}",
                found=stored.dtype,
                remedy="use the model's unquantized files",
            )

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a tensor in the file's own number format."""
        stored = self._tensors[name]
        with _complaints(stored.file):
            file = self._opened(stored.file)
            array: np.ndarray = file.get_slice(name)[index] if stored.shape else file.get_tensor(name)
        self._mapped += max(array.nbytes, _NEIGHBOURS)
        return array

    def sample(self, name: str) -> bytes:
        """The beginnings of some rows."""
        stored = self._tensors[name]
        rows, *rest = stored.shape or (1,)
        columns = tuple(slice(0, min(size, _SAMPLED_COLUMNS)) for size in rest)
        if not rest:
            return self.read(name, (slice(0, min(rows, _SAMPLED_COLUMNS)),)).tobytes()
        chosen = sorted({round(i * (rows - 1) / (_SAMPLED_ROWS - 1)) for i in range(_SAMPLED_ROWS)}) if rows else []
        return b"".join(self.read(name, (slice(row, row + 1), *columns)).tobytes() for row in chosen)

    def _opened(self, path: Path) -> Any:
        """The open file, opened anew now and then: its mapped pages count as this process's memory until then."""
        if self._file is None or self._file[0] is not path or self._mapped > _MAX_MAPPED:
            self._file, self._mapped = (path, safe_open(str(path), framework="numpy")), 0
        return self._file[1]

    def _read_headers(self) -> dict[str, _Stored]:
        listed = self._index()
        files = sorted(set(listed.values())) if listed is not None else [self._only_file()]
        tensors: dict[str, _Stored] = {}
        for file in files:
            path = self.folder / file
            with _complaints(path), safe_open(str(path), framework="numpy") as handle:
                for name in handle.keys():  # noqa: SIM118  (not a mapping)
                    view = handle.get_slice(name)
                    if listed is None or listed.get(name) == file:
                        tensors[name] = _Stored(path, tuple(view.get_shape()), view.get_dtype())
        lost = [name for name in listed or () if name not in tensors]
        if lost and listed is not None:
            raise NaloraError(
                str(self.folder / INDEX),
                expected=f"{lost[0]} in {listed[lost[0]]}",
                found="a file without it",
                remedy="download the folder again: index and files are of different versions",
            )
        return tensors

    def _index(self) -> dict[str, str] | None:
        """File name by tensor name, or None where the folder has no index."""
        path = self.folder / INDEX
        if not path.exists():
            return None
        listed = read_json(path).get("weight_map")
        names = listed.values() if isinstance(listed, dict) else [None]
        if not listed or not all(isinstance(n, str) and Path(n).name == n for n in names):
            raise NaloraError(
                f"{path}: weight_map", expected="file names of this folder by tensor name", found="something else"
            )
        missing = sorted(name for name in set(names) if not (self.folder / name).is_file())
        if missing:
            raise NaloraError(
                str(path),
                expected=f"the file {missing[0]} that it names",
                found=f"{len(missing)} of {len(set(names))} files missing",
                remedy="download the folder again",
            )
        return dict(listed)

    def _only_file(self) -> str:
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if "model.safetensors" in found:
            return "model.safetensors"
        if len(found) != 1:
            raise NaloraError(
                self.where,
                expected=f"model.safetensors, or several files and {INDEX}",
                found=", ".join(found) or "no safetensors file",
                remedy=_pickle_remedy(self.folder) if not found else f"add {INDEX}",
            )
        return found[0]


def _pickle_remedy(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        return "give a folder with config.json, tokenizer.json and safetensors files"
    return (
        f"{pickles[0]} is a pickle, which can run any code when it is opened, and is never read; "
        "convert it with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    )


@contextmanager
def _complaints(path: Path) -> Iterator[None]:
    """Turns what safetensors says about a file into an error that names it."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise NaloraError(
            str(path),
            expected="a complete safetensors file",
            found=str(error),
            remedy="download it again: it is truncated, damaged or of another format",
        ) from error
