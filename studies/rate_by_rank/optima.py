"""Prints each method's best rate, the power of the rank that fits these rates, and what rules cost.

python studies/rate_by_rank/optima.py [FOLDER]    # of another study; without a folder: of this one
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nalora_jax.study.analysis import MethodResult, results
from nalora_jax.study.protocol import Protocol, read_protocol
from nalora_jax.study.records import Records

AT_RANK_8 = 4e-3
POWERS = (0, 1 / 3, 1 / 2, 2 / 3, 1)  # of 8 / rank


def optimum(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Returns the vertex of the parabola through the best rate and its neighbors; NaN at an end of the grid.

    The parabola is over the logarithm of the rate.
    """
    best = int(np.argmin(losses))
    if best in (0, len(rates) - 1):
        return float("nan")
    near = slice(best - 1, best + 2)
    square, linear, _ = np.polyfit(np.log2(rates[near]) - np.log2(rates[best]), losses[near], 2)
    return float(rates[best] * 2 ** (-linear / (2 * square)))


def excess(rates: Sequence[float], losses: Sequence[float], rate: float) -> float:
    """Returns the loss at ``rate`` minus the best measured loss.

    Losses are interpolated linearly in the logarithm of the rate; NaN outside of the grid.
    """
    outside = float("nan")
    return float(np.interp(np.log2(rate), np.log2(rates), losses, outside, outside)) - min(losses)


def rank_and_scale(protocol: Protocol, result: MethodResult) -> tuple[int, float]:
    """Returns the rank and alpha / rank of a method with one rule."""
    (rule,) = protocol.config(*result.cell, rate=1.0, seed=0).lora.rules
    return rule.rank, (rule.alpha or 2 * rule.rank) / rule.rank


def main() -> None:
    """Prints a line for every method and task, then fits and rules by series."""
    protocol = read_protocol(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
    series: dict[str, list[tuple[int, float, MethodResult]]] = {}
    for result in results(protocol, Records(protocol.folder).read()):
        (rank, scale), tuned = rank_and_scale(protocol, result), result.tuning
        if tuned.chosen is None:
            print(f"{result.cell.task} {result.cell.method}: its grid is not complete")
            continue
        vertex = optimum(tuned.rates, tuned.losses)
        print(
            f"{result.cell.task} {result.cell.method}: best {tuned.chosen:g}, vertex {vertex:.2g}", end=""
        )
        print(f", at {AT_RANK_8:g} {excess(tuned.rates, tuned.losses, AT_RANK_8):+.4f}")
        for name in (["alpha twice the rank"] if scale == 2 else []) + (
            ["alpha 16"] if scale * rank == 16 else []
        ):
            series.setdefault(name, []).append((rank, vertex, result))
    for name, members in series.items():
        ranks, vertices = np.array([[rank, vertex] for rank, vertex, _ in members]).T
        inside = np.isfinite(vertices)
        slope, level = np.polyfit(np.log2(ranks[inside] / 8), np.log2(vertices[inside]), 1)
        print(
            f"{name}: {2**level:.2g} * (8 / rank)^{-slope:.2f} from {inside.sum()} of {len(members)} methods"
        )
        for power in POWERS:
            costs = [
                excess(result.tuning.rates, result.tuning.losses, AT_RANK_8 * (8 / rank) ** power)
                for rank, _, result in members
            ]
            print(
                f"  {AT_RANK_8:g} * (8 / rank)^{power:.2g}: mean excess {np.mean(costs):.4f}, largest {max(costs):.4f}"
            )


if __name__ == "__main__":
    main()
