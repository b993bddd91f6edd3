"""The library of native kernels: compiled on first use, cached, and registered with XLA."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
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
DEADLINE = 120  # seconds; compilation takes 10 to 30
_MAKING = "making-"  # prefix of the folders in which libraries are compiled
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
    *(f"-m{feature}" for feature in ("avx512f", "avx512bw", "avx512vl", "avx512bf16", "fma")),
    "-mprefer-vector-width=512",
)
# The ways to compute matmuls, fastest first, with their compiler flags.
_FLAGS = {
    "tiles": ("-DNALORA_TILES", "-mamx-tile", "-mamx-bf16", *_VECTORS),
    "vectors": ("-DNALORA_DOTS", *_VECTORS),
    "floats": ("-DNALORA_FLOATS", "-mavx2", "-mfma"),
    "plain": (),
}
_FUNCTIONS = (
    "products",
    "attention",
    "attention_gradient",
    "cached_attention",
    "over_vocabulary",
    "gate",
    "gate_gradient",
    "gate_statistics",
    "gate_measured",
    "add_rms",
    "normalise",
    "norm_gradient",
)


def name_of(function: str) -> str:
    """Returns XLA's name of a function of the library in use."""
    return f"nalora_{function}_{_wanted()}"


def has_tiles() -> bool:
    """Returns True if the CPU has matrix tiles for bf16."""
    return "tiles" in processor.kinds()


def kind(choice: str) -> str | None:
    """Returns the kind of kernels that ``NALORA_NATIVE`` selects; None for XLA.

    Plain kernels are slower than XLA and are used on request only. The same holds for AVX2 kernels
    on a CPU with AVX-512, on which XLA multiplies twice as many values at a time.

    Raises:
      NaloraError: the choice does not exist, or this CPU cannot run it.
    """
    if choice == "0":
        return None
    if choice in ("", "1"):
        fastest = processor.kinds()[0]
        slow = fastest == "plain" or (fastest == "floats" and "avx512f" in processor.features())
        if slow:
            return None
        return fastest
    if choice not in processor.kinds():
        raise NaloraError(
            "NALORA_NATIVE",
            expected=f"0, 1 or, on this CPU, {' or '.join(processor.kinds())}",
            found=choice,
        )
    return choice


def available(devices: int = 1) -> bool:
    """Returns True if the functions are compiled, registered and support this number of devices.

    If a compiler is missing, the reason is logged once. On several devices XLA would gather the
    operands of a foreign function, so only the plain kernels, which tests use, support more than
    one.

    Raises:
      NaloraError: ``NALORA_NATIVE`` has an invalid value.
    """
    return _available(os.environ.get("NALORA_NATIVE", ""), devices)


def multiplies_on_tiles() -> bool:
    """Returns True if the functions run here on matrix tiles."""
    return available() and _wanted() == "tiles"


def multiplies_few_rows() -> bool:
    """Returns True if the functions run here and beat XLA at few rows and single tokens.

    AVX2 kernels do not.
    """
    return available() and _wanted() != "floats"


def _wanted() -> str | None:
    return kind(os.environ.get("NALORA_NATIVE", ""))


@cache
def _available(choice: str, devices: int) -> bool:
    chosen = kind(choice)
    return chosen is not None and (devices == 1 or chosen == "plain") and _registered(chosen)


@cache
def _registered(chosen: str) -> bool:
    """Registers the functions of a kind, once in a process: XLA rejects a second copy of the library.

    The file may be another copy by then, of a process that compiled at the same time.
    """
    try:
        return register(build(find_compiler(), chosen), chosen)
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
      RuntimeError: the compiler fails (the message has its output), or takes longer than
        `DEADLINE`.
    """
    flags = (*_COMMON, *_FLAGS[kind])
    parts = [
        *(source.read_text() for source in _SOURCES),
        jaxlib.version.__version__,
        str(Path(compiler).resolve()),
        *flags,
    ]
    name = f"kernels-{digest_of(chr(0).join(parts))[:16]}"
    folder = private_dir(cache_dir() / "native")
    for existing in folder.glob(f"{name}-*.so"):
        if _digest(existing) == existing.stem.rpartition("-")[2]:
            return existing
        existing.unlink(missing_ok=True)  # truncated or modified
    _remove_abandoned(folder)
    with tempfile.TemporaryDirectory(prefix=_MAKING, dir=folder) as making:
        built = Path(making) / "kernels.so"
        _compile([compiler, *flags, "-I", jax.ffi.include_dir(), str(_MAIN), "-o", str(built)], making)
        target = folder / f"{name}-{_digest(built)}.so"
        built.replace(target)
    return target


def _compile(command: list[str], scratch: str) -> None:
    """Runs the compiler in ``scratch``.

    At its deadline it is killed with all of its child processes.
    """
    environment = {**os.environ, "TMPDIR": scratch}
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "errors": "replace",
    }
    with subprocess.Popen(command, start_new_session=True, env=environment, **pipes) as compiler:  # type: ignore[call-overload]
        try:
            said, _ = compiler.communicate(timeout=DEADLINE)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(compiler.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"{command[0]} had not compiled {_MAIN} after {DEADLINE} s") from None
            raise
    if compiler.returncode:
        raise RuntimeError(f"{command[0]} could not compile {_MAIN}: {' '.join(said.split())[-500:]}")


def _digest(path: Path) -> str:
    return file_digest(path)[:32]


def _remove_abandoned(folder: Path) -> None:
    """Removes folders of processes that were killed while they compiled."""
    for path in folder.glob(f"{_MAKING}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 10 * DEADLINE:
                shutil.rmtree(path, ignore_errors=True)


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
