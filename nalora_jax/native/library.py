"""The library of native kernels: compiled on first use, kept in the cache, made known to XLA."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import jax
import jaxlib.version

from nalora_jax.assets import cache_dir

_log = logging.getLogger(__name__)

_HEADERS = ("tiles.h", "elementwise.h", "products.h", "attention.h", "vocabulary.h", "gates.h")
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cc", *_HEADERS))
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
_TILES = (
    "-DNALORA_TILES",
    *(f"-m{feature}" for feature in ("amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512vl", "avx512bf16", "fma")),
    "-mprefer-vector-width=512",
)
_FUNCTIONS = (
    "products",
    "attention",
    "attention_gradient",
    "over_vocabulary",
    "gate",
    "gate_gradient",
    "gate_statistics",
)


def name_of(function: str, plain: bool | None = None) -> str:
    """The name under which XLA knows a function of the library."""
    plain = os.environ.get("NALORA_NATIVE") == "plain" if plain is None else plain
    return f"nalora_{function}{'_plain' if plain else ''}"


@cache
def has_tiles() -> bool:
    """Whether this is a CPU with matrix tiles for bf16."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def available() -> bool:
    """Whether these functions can run here, compiled and registered; why not is logged once if a compiler is lacking.

    On several devices XLA would gather what a foreign function reads, so that they are for one CPU device only.
    """
    return jax.default_backend() == "cpu" and _available(os.environ.get("NALORA_NATIVE", ""), jax.device_count())


@cache
def _available(choice: str, devices: int) -> bool:
    plain = choice == "plain"
    if choice == "0" or not (plain or (devices == 1 and has_tiles() and platform.machine() == "x86_64")):
        return False
    try:
        return register(build(find_compiler(), tiles=not plain), plain=plain)
    except (OSError, RuntimeError) as error:
        _log.warning("products and attention are XLA's, at half the speed of this CPU's tiles: %s", error)
        return False


def find_compiler() -> str:
    """``$CXX``, or the first C++ compiler on the path.

    Raises:
      RuntimeError: there is none.
    """
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if found := shutil.which(name):
            return found
    raise RuntimeError("no C++ compiler was found; install g++ or name one in CXX")


def build(compiler: str, *, tiles: bool = True) -> Path:
    """The compiled library, from the cache where it has been compiled before.

    Args:
      compiler: a C++17 compiler.
      tiles: for the tiles; else plain C++, for any CPU.

    Raises:
      RuntimeError: the compiler fails; with what it says.
    """
    flags = (*_FLAGS, *(_TILES if tiles else ()))
    parts = [
        *(source.read_text() for source in _SOURCES),
        jaxlib.version.__version__,
        str(Path(compiler).resolve()),
        *flags,
    ]
    target = cache_dir() / "native" / f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [compiler, *flags, "-I", jax.ffi.include_dir(), str(_SOURCES[0]), "-o", str(made)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{compiler} could not compile {_SOURCES[0]}: {run.stderr.strip()[-500:]}")
        made.replace(target)
    return target


def register(library: Path, *, plain: bool = False) -> bool:
    """Makes a library's functions known to XLA; whether this process may use them."""
    handle = ctypes.CDLL(str(library))
    if handle.nalora_prepare() != 0:
        return False
    for function in _FUNCTIONS:
        capsule = jax.ffi.pycapsule(getattr(handle, f"nalora_{function}"))
        jax.ffi.register_ffi_target(name_of(function, plain), capsule, platform="cpu")
    return True
