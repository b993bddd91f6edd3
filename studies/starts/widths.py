"""Prints over how many doublings of the learning rate each start stays close to its best loss.

python studies/starts/widths.py [FOLDER]    # of another study; without a folder: of this one
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nalora_jax.study.analysis import MethodResult, results
from nalora_jax.study.protocol import read_protocol
from nalora_jax.study.records import Records

LIMITS = (0.01, 0.05)  # nats above the best rate's loss
_POINTS = 10_001  # of the interpolated curve


def width(rates: Sequence[float], losses: Sequence[float], limit: float) -> tuple[float, bool]:
    """Returns the doublings around the best rate within ``limit`` of its loss, and if they end in the grid.

    Losses are interpolated linearly in the logarithm of the rate. Diverged runs have infinite losses.
    """
    doublings = np.log2(rates)
    points = np.linspace(doublings[0], doublings[-1], _POINTS)
    curve = np.interp(points, doublings, np.minimum(losses, 1e3))
    outside = np.flatnonzero(curve > min(losses) + limit)
    best = int(np.searchsorted(points, doublings[int(np.argmin(losses))]))
    below, above = outside[outside < best], outside[outside > best]
    low = points[below[-1]] if below.size else points[0]
    high = points[above[0]] if above.size else points[-1]
    return float(high - low), bool(below.size and above.size)


def by_seed(result: MethodResult, seed: int) -> list[float]:
    """Returns the validation losses of a tuning seed, by rate; infinite for diverged runs."""
    losses = {r["rate"]: r["validation"]["loss"] for r in result.tuned if r["seed"] == seed}
    return [np.inf if losses[rate] is None else losses[rate] for rate in result.tuning.rates]


def main() -> None:
    """Prints a line for the mean curve of each start, and for each of its tuning seeds."""
    protocol = read_protocol(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
    for result in results(protocol, Records(protocol.folder).read()):
        rates, mean = result.tuning.rates, result.tuning.losses
        if result.tuning.chosen is None:
            print(f"{result.cell.method}: its grid is not complete")
            continue
        curves = {"mean": mean} | {f"seed {seed}": by_seed(result, seed) for seed in protocol.tuning_seeds}
        for name, losses in curves.items():
            texts = [_text(*width(rates, losses, limit), limit) for limit in LIMITS]
            best = rates[int(np.argmin(losses))]
            print(f"{result.cell.method}, {name}: best {min(losses):.4f} at {best:g}; {'; '.join(texts)}")


def _text(doublings: float, ends: bool, limit: float) -> str:
    at_least = "" if ends else "at least "
    return f"within {limit:g} over {at_least}{doublings:.2f} doublings"


if __name__ == "__main__":
    main()
