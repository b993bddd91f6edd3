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
    """Prints a line for every method and task, then the fit and the rules of each series."""
    protocol = read_protocol(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
    twice: list[tuple[int, float, MethodResult]] = []
    constant: list[tuple[int, float, MethodResult]] = []
    for result in results(protocol, Records(protocol.folder).read()):
        (rank, scale), tuned = rank_and_scale(protocol, result), result.tuning
        name = f"{result.cell.task} {result.cell.method}"
        if tuned.chosen is None:
            print(f"{name}: its grid is not complete")
            continue
        vertex, cost = optimum(tuned.rates, tuned.losses), excess(tuned.rates, tuned.losses, AT_RANK_8)
        print(f"{name}: best {tuned.chosen:g}, vertex {vertex:.2g}, at {AT_RANK_8:g} {cost:+.4f}")
        if scale == 2:
            twice.append((rank, vertex, result))
        if scale * rank == 16:
            constant.append((rank, vertex, result))
    for name, members in (("alpha twice the rank", twice), ("alpha 16", constant)):
        if members:
            _print_rules(name, members)


def _print_rules(name: str, members: Sequence[tuple[int, float, MethodResult]]) -> None:
    inside = [(rank, vertex) for rank, vertex, _ in members if np.isfinite(vertex)]
    ranks, vertices = np.array(inside).T
    slope, level = np.polyfit(np.log2(ranks / 8), np.log2(vertices), 1)
    print(f"{name}: {2**level:.2g} * (8 / rank)^{-slope:.2f} from {len(inside)} of {len(members)} optima")
    for power in POWERS:
        for highest in (AT_RANK_8, np.inf):
            rates = [min(AT_RANK_8 * (8 / rank) ** power, highest) for rank, _, _ in members]
            tunings = [result.tuning for _, _, result in members]
            costs = [excess(t.rates, t.losses, rate) for t, rate in zip(tunings, rates, strict=True)]
            if np.isfinite(costs).all():
                rule = f"{AT_RANK_8:g} * (8 / rank)^{power:.2g}, at most {highest:g}"
                print(f"  {rule}: mean excess {np.mean(costs):.4f}, largest {max(costs):.4f}")


if __name__ == "__main__":
    main()
