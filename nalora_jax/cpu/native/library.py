"""The library of native kernels: compiled on first use, cached, and registered with XLA."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import jax
import jaxlib.version

from nalora_jax.common import processor
from nalora_jax.common.digests import digest_of, file_digest
from nalora_jax.common.downloads import cache_dir, private_dir
from nalora_jax.errors import NaloraError

_log = logging.getLogger(__name__)

_MAIN = Path(__file__).with_name("kernels.cc")
_SOURCES = (_MAIN, *sorted(_MAIN.parent.glob("*.h")))
# -fno-trapping-math: otherwise loops with comparisons are vectorized only on targets with masks.
_COMMON = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fno-trapping-math", "-fPIC", "-shared", "-w")
_VECTORS = (
    *(f"-m{feature}" for feature in ("avx512f", "avx512bw", "avx512vl", "avx512bf16", "avx2", "fma")),
    "-mprefer-vector-width=512",
)
# The ways to compute matmuls, fastest first, with their compiler flags.
_FLAGS = {
    "tiles": ("-DNALORA_TILES", "-mamx-tile", "-mamx-bf16", *_VECTORS),
    "vectors": ("-DNALORA_DOTS", *_VECTORS),
    "floats": ("-mavx2", "-mfma"),
}
_FUNCTIONS = ("products", "attention", "attention_gradient", "over_vocabulary", "gate", "gate_gradient")


def chosen() -> str | None:
    """Returns the kind of kernels that ``NALORA_NATIVE`` selects; None for XLA.

    AVX2 kernels are used on request only if the CPU has AVX-512, on which XLA multiplies twice as
    many values at a time.

    Raises:
      NaloraError: the choice does not exist, or this CPU cannot run it.
    """
    choice, kinds = os.environ.get("NALORA_NATIVE", ""), processor.kinds()
    if choice == "0":
        return None
    if choice in ("", "1"):
        slow = not kinds or (kinds[0] == "floats" and "avx512f" in processor.features())
        return None if slow else kinds[0]
    if choice not in kinds:
        expected = f"0, 1 or, on this CPU, {' or '.join(kinds) or 'none'}"
        raise NaloraError("NALORA_NATIVE", expected=expected, found=choice)
    return choice


def kind(devices: int = 1) -> str | None:
    """Returns the kind of kernels that programs on this number of devices call; None for XLA.

    If a compiler is missing, the reason is logged once. On several devices XLA would gather the
    operands of a foreign function.

    Raises:
      NaloraError: ``NALORA_NATIVE`` has an invalid value.
    """
    name = chosen()
    if name is None or devices > 1 or not _registered(name):
        return None
    return name


@cache
def _registered(kind: str) -> bool:
    """Registers the functions of a kind, once in a process: XLA rejects a second copy of the library.

    The file may be another copy by then, of a process that compiled at the same time.
    """
    try:
        return register(build(find_compiler(), kind), kind)
    except (OSError, RuntimeError) as error:
        _log.warning("products and attention are XLA's, slower than this CPU's own instructions: %s", error)
        return False


def find_compiler() -> str:
    """Returns ``$CXX``, or the first C++ compiler on the path.

    Raises:
      RuntimeError: there is no compiler.
    """
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            return path
    raise RuntimeError("no C++ compiler was found; install g++ or name one in CXX")


def build(compiler: str, kind: str) -> Path:
    """Returns the path of the compiled library, from the cache if it has a valid copy.

    Its name ends with the digest of its content, which is verified before use.

    Args:
      compiler: a C++17 compiler.
      kind: one of `nalora_jax.common.processor.kinds`.

    Raises:
      OSError: other users could write into the cache folder, whose content is executed.
      RuntimeError: the compiler fails; the message has its output.
    """
    flags = (*_COMMON, *_FLAGS[kind])
    sources = [source.read_text() for source in _SOURCES]
    parts = [*sources, jaxlib.version.__version__, str(Path(compiler).resolve()), *flags]
    name = f"kernels-{digest_of(chr(0).join(parts))[:16]}"
    folder = private_dir(cache_dir() / "native")
    for existing in folder.glob(f"{name}-*.so"):
        if _digest(existing) == existing.stem.rpartition("-")[2]:
            return existing
        existing.unlink(missing_ok=True)  # truncated or modified
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder) as making:
        built = Path(making) / "kernels.so"
        command = [compiler, *flags, "-I", jax.ffi.include_dir(), str(_MAIN), "-o", str(built)]
        environment = {**os.environ, "TMPDIR": making}
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        if done.returncode:
            output = " ".join((done.stdout + done.stderr).decode(errors="replace").split())
            raise RuntimeError(f"{compiler} could not compile {_MAIN}: {output[-500:]}")
        target = folder / f"{name}-{_digest(built)}.so"
        built.replace(target)
    return target


def _digest(path: Path) -> str:
    return file_digest(path)[:32]


def register(library: Path, kind: str) -> bool:
    """Registers a library's functions with XLA.

    Returns False if this process may not use them.

    Raises:
      OSError: the library cannot be loaded.
      RuntimeError: a function is missing; then none is registered.
    """
    handle = ctypes.CDLL(str(library))
    try:
        prepare = handle.nalora_prepare
        functions = {name: getattr(handle, f"nalora_{name}") for name in _FUNCTIONS}
    except AttributeError as error:
        raise RuntimeError(f"{library} is not of this version: {error}; remove it") from None
    if prepare() != 0:
        return False
    for name, function in functions.items():
        jax.ffi.register_ffi_target(f"nalora_{name}_{kind}", jax.ffi.pycapsule(function), platform="cpu")
    return True
