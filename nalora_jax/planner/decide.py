"""The choice of a run's layout: estimates rank the candidates, the compiler accepts one of them.

A layout is accepted if its compiled step fits in memory and takes at most `SLOWER` times the
estimated seconds, both according to its memory analysis and its scheduled collectives. Otherwise
the next candidates are compiled, at most `MOST_COMPILED` in total. Their estimates are corrected
by the programs compiled so far.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from nalora_jax.errors import NaloraError
from nalora_jax.planner.estimates import Layout
from nalora_jax.planner.layouts import fastest

log = logging.getLogger(__name__)

SLOWER = 1.3  # largest accepted ratio of compiled to estimated seconds
MOST_COMPILED = 4  # largest number of layouts to compile
_EXHAUSTED = (
    1.1  # of the limit: assumed memory of a program that was rejected without a figure
)


@dataclass(frozen=True)
class Compiled:
    """Resources that a compiled step needs on each chip.

    Attributes:
      memory: bytes of the chip's memory; None if there is no program.
      fits: True if the memory of the chip and of its host is large enough.
      seconds: duration of a step, by roofline.
      program: for the caller.
      failure: why there is no program.
    """

    memory: float | None
    fits: bool
    seconds: float
    program: Any = None
    failure: str = ""

    def __str__(self) -> str:
        """Returns the text for messages."""
        if self.memory is None:
            return self.failure
        return f"compiled: {self.memory / 1e9:.1f} GB, {self.seconds:.3g} s"


EXHAUSTED = Compiled(None, False, math.inf, failure="out of memory")
# An internal error of the compiler, such as collectives for which libtpu has no route on a mesh.
FAILED = Compiled(None, False, math.inf, failure="the compiler failed")


Tried = list[tuple[Layout, Compiled]]  # compiled layouts, in their order


def _next(candidates: Sequence[Layout], limit: float, tried: Tried) -> Layout | None:
    """Returns the next layout to compile; None after an accepted one or `MOST_COMPILED`."""
    if not tried:
        return fastest(candidates)
    layout, last = tried[-1]
    if len(tried) >= MOST_COMPILED or (
        last.fits and last.seconds <= SLOWER * layout.seconds
    ):
        return None

    def memory(layout: Layout) -> float:
        """Returns estimated bytes times the largest ratio of compiled to estimated bytes so far."""
        known = ((other, result) for other, result in tried if result is not FAILED)
        ratios = (
            (result.memory or _EXHAUSTED * limit) / other.memory
            for other, result in known
        )
        return layout.memory * max((1.0, *ratios))

    def seconds(layout: Layout) -> float:
        """Returns estimated seconds times the largest such ratio of seconds of the same mesh."""
        same = (
            (other, result)
            for other, result in tried
            if other.mesh == layout.mesh and result.memory
        )
        return layout.seconds * max(
            (result.seconds / other.seconds for other, result in same), default=1.0
        )

    best = min((result.seconds for _, result in tried if result.fits), default=math.inf)
    failed = [other.mesh for other, result in tried if result is FAILED]
    compiled = {id(layout) for layout, _ in tried}
    left = [
        layout
        for layout in candidates
        if layout.mesh not in failed and id(layout) not in compiled
    ]
    fitting = [
        layout for layout in left if memory(layout) <= limit and seconds(layout) < best
    ]
    if fitting:
        return fastest(fitting, seconds)
    if best == math.inf:
        return min(left, key=memory, default=None)
    return None


def decide(
    candidates: Sequence[Layout],
    limit: float,
    compiled: Callable[[Layout], Compiled],
    *,
    must_fit: bool = True,
) -> tuple[Layout, Compiled, Tried]:
    """Returns the chosen layout, its program, and all that were compiled.

    It is the fastest compiled layout that fits, or the smallest if none fits and none must.

    Args:
      candidates: layouts that are estimated to fit.
      limit: bytes of a chip's memory that a program may use.
      compiled: compiles the step of a layout; may raise that the compiler or a device ran out of
        memory, or an internal error of the compiler, which excludes the layout's mesh.
      must_fit: if False, a program that does not fit is enough.

    Raises:
      NaloraError: no compiled layout fits, or none has a program.
      JaxRuntimeError: another error, or such internal errors for all layouts.
    """
    tried: Tried = []
    while (layout := _next(candidates, limit, tried)) is not None:
        try:
            tried.append((layout, compiled(layout)))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                tried.append((layout, EXHAUSTED))
            elif str(error).startswith("INTERNAL") and "while compiling" in str(error):
                log.warning("mesh: %s: %s", layout.short, str(error).splitlines()[0])
                tried.append((layout, FAILED))
                if _next(candidates, limit, tried) is None and all(
                    result is FAILED for _, result in tried
                ):
                    raise
            else:
                raise

    def rank(pair: tuple[Layout, Compiled]) -> tuple[bool, float]:
        """Orders the fastest that fits first, else the smallest."""
        _, result = pair
        if result.fits:
            return False, result.seconds
        return True, result.memory or math.inf

    layout, result = min(tried, key=rank)
    if result.memory is None or (must_fit and not result.fits):
        raise NaloraError(
            "--mesh",
            expected=f"a layout whose compiled step fits in {limit / 1e9:.1f} GB a chip",
            found="; ".join(f"{layout.short} ({result})" for layout, result in tried),
            remedy="use more chips, fewer rows a device (--train.accumulate), "
            "shorter rows, or --compute.quantize int8",
        )
    others = [
        f"{other.short} ({program})" for other, program in tried if other is not layout
    ]
    if others:
        log.info("mesh: %s (%s) instead of %s", layout.short, result, "; ".join(others))
    return layout, result, tried
