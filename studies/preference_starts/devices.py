"""Prints how far the number of devices changes the results of each start, and which runs stick."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from nalora_jax.study.analysis import MethodResult, results
from nalora_jax.study.hypothesis_tests import Paired, compare_pairs, holm
from nalora_jax.study.protocol import read_protocol
from nalora_jax.study.records import Records, StudyRecord

STUCK = 0.683  # a validation loss above it after training; ln 2 = 0.693 before
STARTS = ("b_zero", "a_zero")


def between_devices(by_method: Mapping[str, MethodResult], margin: float) -> dict[str, Paired]:
    """Returns the paired difference of the test loss from one device, for every other mesh of each start."""
    compared = {}
    for name, result in by_method.items():
        start = next(start for start in STARTS if name.startswith(start))
        tests, reference = result.finite(), by_method[start].finite()
        seeds = sorted(tests.keys() & reference.keys())
        if name != start and seeds:
            losses = [[float(side[seed]["test"]["loss"]) for seed in seeds] for side in (tests, reference)]
            compared[name] = compare_pairs(*losses, margin)
    return compared


def spreads(by_method: Mapping[str, MethodResult], start: str) -> dict[float, float]:
    """Returns by rate the largest difference of a tuning seed's validation loss between two meshes."""
    largest: dict[float, float] = {}
    meshes = [result for name, result in by_method.items() if name.startswith(start)]
    for rate in meshes[0].tuning.rates:
        by_seed: dict[int, list[float]] = {}
        for record in (record for mesh in meshes for record in mesh.at_rate(rate)):
            by_seed.setdefault(record["seed"], []).append(float(record["validation"]["loss"]))
        if by_seed:
            largest[rate] = max(max(losses) - min(losses) for losses in by_seed.values())
    return largest


def stuck(result: MethodResult) -> tuple[list[StudyRecord], int]:
    """Returns the runs up to the chosen rate that stick, and the number of runs up to that rate."""
    highest = result.tuning.chosen or math.inf
    runs = [record for record in (*result.tuned, *result.tests.values()) if record["rate"] <= highest]
    return [run for run in runs if run["diverged"] or run["validation"]["loss"] > STUCK], len(runs)


def main() -> None:
    """Prints the chosen rates, the runs that stick, and the differences between meshes."""
    protocol = read_protocol(Path(__file__).parent)
    by_method = {r.cell.method: r for r in results(protocol, Records(protocol.folder).read())}
    for name, result in by_method.items():
        sticking, count = stuck(result)
        where = ", ".join(f"rate {r['rate']:g} seed {r['seed']}" for r in sticking) or "none"
        print(f"{name}: rate {result.tuning.chosen}; {len(sticking)} of {count} runs stick: {where}")
    for start in STARTS:
        texts = [f"{rate:g}: {spread:.6f}" for rate, spread in spreads(by_method, start).items()]
        print(f"{start}, largest difference between meshes by rate: {', '.join(texts)}")
    compared = between_devices(by_method, protocol.margin)
    corrected = holm([p.t_p for p in compared.values()])
    for (name, p), by_holm in zip(compared.items(), corrected, strict=True):
        interval = f"({p.low:.6f} to {p.high:.6f})"
        print(f"{name} minus one device: {p.mean:+.6f} {interval}, p {p.t_p:.3f} ({by_holm:.3f})")


if __name__ == "__main__":
    main()
