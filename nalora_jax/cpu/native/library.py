"""The library of native kernels: compiled on first use, cached, and registered with XLA."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib.version

from nalora_jax.common import processor
from nalora_jax.common.digests import digest_of, file_digest
from nalora_jax.common.downloads import cache_dir, private_dir
from nalora_jax.errors import NaloraError
from nalora_jax.ops.dispatch import Numerics, native_kind

_log = logging.getLogger(__name__)

_MAIN = Path(__file__).with_name("kernels.cc")
_SOURCES = (_MAIN, *sorted(_MAIN.parent.glob("*.h")))
# -fno-trapping-math: otherwise loops with comparisons are vectorized only on targets with masks.
_COMMON = (
    "-O3",
    "-std=c++17",
    "-ffp-contract=fast",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-w",
)
_VECTORS = (
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512bf16",
    "-mavx2",
    "-mfma",
    "-mprefer-vector-width=512",
)
# The ways to compute matmuls, fastest first, with their compiler flags.
_FLAGS = {
    "tiles": ("-DNALORA_TILES", "-mamx-tile", "-mamx-bf16", *_VECTORS),
    "vectors": ("-DNALORA_DOTS", *_VECTORS),
    "floats": ("-mavx2", "-mfma"),
}
_FUNCTIONS = ("products", "attention", "attention_gradient", "over_vocabulary")


def select_kernels() -> str | None:
    """Returns the kind of kernels that ``NALORA_NATIVE`` selects; None for XLA.

    AVX2 kernels are used on request only if the CPU has AVX-512, on which XLA multiplies twice as
    many values at a time. Raises a NaloraError if this CPU does not have the choice.
    """
    choice = os.environ.get("NALORA_NATIVE", "")
    kinds = processor.kinds()
    if choice == "0":
        return None
    if choice in ("", "1"):
        if not kinds:
            return None
        if kinds[0] == "floats" and "avx512f" in processor.features():
            return None
        return kinds[0]
    if choice not in kinds:
        raise NaloraError(
            "NALORA_NATIVE",
            expected=f"0, 1 or, on this CPU, {' or '.join(kinds) or 'none'}",
            found=choice,
        )
    return choice


def kind(devices: int = 1) -> str | None:
    """Returns the kind of kernels that programs on this number of devices call; None for XLA.

    If a compiler is missing, the reason is logged once. On several devices XLA would gather the
    operands of a foreign function. Raises what `select_kernels` raises.
    """
    name = select_kernels()
    if name is not None and devices == 1 and _register(name):
        return name
    return None


@native_kind.implements("cpu")
def kind_for(numerics: Numerics) -> str:
    """Returns the kind of kernels for bf16 operands."""
    if numerics.operand != "bfloat16":
        return ""
    return kind(numerics.platform.devices) or ""


def call(
    function: str, shapes: Sequence[Any], **attributes: Any
) -> Callable[..., list[jax.Array]]:
    """Returns a call of the library with results of these shapes; `jax.vmap` makes it a loop."""
    name = f"nalora_{function}_{kind()}"
    foreign = jax.ffi.ffi_call(name, shapes, vmap_method="sequential")
    return lambda *operands: list(foreign(*operands, **attributes))


@cache
def _register(kind: str) -> bool:
    """Registers the functions of a kind with XLA; returns False if this machine cannot use them.

    Once in a process: XLA rejects a second copy of the library, and the file may have become
    another copy, of a process that compiled at the same time.
    """
    try:
        library = ctypes.CDLL(str(build(find_compiler(), kind)))
    except (OSError, RuntimeError) as error:
        _log.warning(
            "matmuls and attention are XLA's, slower than native kernels on this CPU: %s",
            error,
        )
        return False
    if library.nalora_prepare() != 0:  # this process may not use tiles
        return False
    for name in _FUNCTIONS:
        function = jax.ffi.pycapsule(getattr(library, f"nalora_{name}"))
        jax.ffi.register_ffi_target(f"nalora_{name}_{kind}", function, platform="cpu")
    return True


def find_compiler() -> str:
    """Returns ``$CXX``, or the first C++ compiler on the path; raises a RuntimeError if there is
    none."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            return path
    raise RuntimeError("no C++ compiler was found; install g++ or name one in CXX")


def build(compiler: str, kind: str) -> Path:
    """Returns the path of the library of a kind, from the cache if it has a valid copy.

    Its name ends with the digest of its content, which is verified before use.

    Raises:
      OSError: other users could write into the cache folder, whose content is executed.
      RuntimeError: the compiler fails; the message has its output.
    """
    flags = (*_COMMON, *_FLAGS[kind])
    sources = [source.read_text() for source in _SOURCES]
    parts = [
        *sources,
        jaxlib.version.__version__,
        str(Path(compiler).resolve()),
        *flags,
    ]
    version = digest_of("\0".join(parts))
    name = f"kernels-{version[:16]}"
    folder = private_dir(cache_dir() / "native")
    for existing in folder.glob(f"{name}-*.so"):
        expected = existing.stem.rpartition("-")[2]
        if file_digest(existing)[:32] == expected:
            return existing
        existing.unlink(missing_ok=True)  # truncated or modified
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder) as making:
        built = Path(making) / "kernels.so"
        command = [
            compiler,
            *flags,
            "-I",
            jax.ffi.include_dir(),
            str(_MAIN),
            "-o",
            str(built),
        ]
        environment = {**os.environ, "TMPDIR": making}
        done = subprocess.run(
            command, capture_output=True, env=environment, check=False
        )
        if done.returncode:
            output = (done.stdout + done.stderr).decode(errors="replace")
            words = " ".join(output.split())
            raise RuntimeError(f"{compiler} could not compile {_MAIN}: {words[-500:]}")
        target = folder / f"{name}-{file_digest(built)[:32]}.so"
        built.replace(target)
    return target
