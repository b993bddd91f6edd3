"""The choice of a run's layout: estimates rank the candidates, the compiler accepts one of them.

A layout is accepted if its compiled step fits in memory and takes at most `SLOWER` times the
estimated seconds, both according to its memory analysis and its scheduled collectives. Otherwise
the next candidates are compiled, at most `MOST` in total. Their estimates are corrected by the
programs compiled so far.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from nalora_jax.errors import NaloraError
from nalora_jax.layout.estimates import Layout
from nalora_jax.layout.layouts import fastest

log = logging.getLogger(__name__)

SLOWER = 1.3  # largest accepted ratio of compiled to estimated seconds
MOST = 4  # largest number of layouts to compile
_EXHAUSTED = 1.1  # of the limit: assumed memory of a program that was rejected without a figure


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


@dataclass
class Search:
    """Candidates, and the programs compiled so far.

    Attributes:
      candidates: layouts that are estimated to fit.
      limit: bytes of a chip's memory that a program may use.
      tried: compiled layouts, in their order.
    """

    candidates: Sequence[Layout]
    limit: float
    tried: list[tuple[Layout, Compiled]] = field(default_factory=list)

    def next(self) -> Layout | None:
        """Returns the next layout to compile.

        Returns None if a compiled layout is accepted or `MOST` have been compiled.
        """
        if not self.tried:
            return fastest(self.candidates)
        layout, last = self.tried[-1]
        if len(self.tried) >= MOST or (last.fits and last.seconds <= SLOWER * layout.seconds):
            return None
        best = min((result.seconds for _, result in self.tried if result.fits), default=math.inf)
        failed = [other.mesh for other, result in self.tried if result is FAILED]
        left = [
            layout
            for layout in self.candidates
            if layout.mesh not in failed and all(layout is not other for other, _ in self.tried)
        ]
        small = [layout for layout in left if self._memory(layout) <= self.limit]
        fitting = [layout for layout in small if self._seconds(layout) < best]
        if fitting:
            return fastest(fitting, self._seconds)
        if best == math.inf:
            return min(left, key=self._memory, default=None)
        return None

    def _memory(self, layout: Layout) -> float:
        """Returns estimated bytes times the largest ratio of compiled to estimated bytes so far."""
        known = ((other, result) for other, result in self.tried if result is not FAILED)
        ratios = ((result.memory or _EXHAUSTED * self.limit) / other.memory for other, result in known)
        return layout.memory * max((1.0, *ratios))

    def _seconds(self, layout: Layout) -> float:
        """Returns estimated seconds times the largest such ratio of seconds of the same mesh."""
        same = (
            (other, result) for other, result in self.tried if other.mesh == layout.mesh and result.memory
        )
        return layout.seconds * max((result.seconds / other.seconds for other, result in same), default=1.0)


def decide(
    search: Search, compiled: Callable[[Layout], Compiled], *, must_fit: bool = True
) -> tuple[Layout, Compiled]:
    """Returns the chosen layout and its program.

    It is the fastest compiled layout that fits, or the smallest if none fits and none must.

    Args:
      search: candidates; layouts that were tried before count.
      compiled: compiles the step of a layout; may raise that the compiler or a device ran out of memory, or
        an internal error of the compiler, which excludes the layout's mesh.
      must_fit: if False, a program that does not fit is enough.

    Raises:
      NaloraError: no compiled layout fits, or none has a program.
      JaxRuntimeError: another error, or such internal errors for all layouts.
    """
    while (layout := search.next()) is not None:
        try:
            search.tried.append((layout, compiled(layout)))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                search.tried.append((layout, EXHAUSTED))
            elif str(error).startswith("INTERNAL") and "while compiling" in str(error):
                log.warning("mesh: %s: %s", layout.short, str(error).splitlines()[0])
                search.tried.append((layout, FAILED))
                if search.next() is None and all(result is FAILED for _, result in search.tried):
                    raise
            else:
                raise
    # The fastest that fits, else the smallest.
    layout, result = min(
        search.tried,
        key=lambda pair: (
            not pair[1].fits,
            pair[1].seconds if pair[1].fits else pair[1].memory or math.inf,
        ),
    )
    if result.memory is None or (must_fit and not result.fits):
        raise NaloraError(
            "--mesh",
            expected=f"a layout whose compiled step fits in {search.limit / 1e9:.1f} GB a chip",
            found="; ".join(f"{layout.short} ({result})" for layout, result in search.tried),
            remedy="use more chips, fewer rows a device (--train.accumulate), shorter rows, or --compute.quantize int8",
        )
    tried = [f"{other.short} ({program})" for other, program in search.tried if other is not layout]
    if tried:
        log.info("mesh: %s (%s) instead of %s", layout.short, result, "; ".join(tried))
    return layout, result
