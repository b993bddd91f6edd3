"""Progress of a study, as text."""

from __future__ import annotations

from nalora_jax.study.analysis import named
from nalora_jax.study.execution import hours
from nalora_jax.study.plan import Cell, cells, tuning, wanted
from nalora_jax.study.protocol import Protocol
from nalora_jax.study.provenance import checked_records
from nalora_jax.study.records import Record, Records


def status(protocol: Protocol) -> str:
    """Returns the numbers of runs, the time spent and estimated, and the chosen learning rates.

    Raises:
      NaloraError: records or protocol were changed (`checked_records`).
    """
    store = Records(protocol.folder)
    records = checked_records(protocol, store)
    runs = wanted(protocol, records)
    left = [run for run in runs if run.id not in records]
    busy = [run for run in left if store.claimed(run.id)]
    untuned = [cell for cell in cells(protocol) if tuning(protocol, cell, records).chosen is None]
    later = len(untuned) * len(protocol.test_seeds) * len(protocol.test_multiples)
    spent = hours(records)
    lines = [
        f"{protocol.path}: {protocol.question}",
        f"runs: {len(runs) - len(left)} done, {len(busy)} in progress, {len(left) - len(busy)} to do"
        + (f", and {later} tests once their learning rates are chosen" if later else ""),
        f"time: {spent:.1f} h spent"
        + (f" of {protocol.budget_hours:g} h" if protocol.budget_hours else "")
        + (f", about {(len(left) + later) * spent / len(records):.1f} h left" if records else ""),
    ]
    if protocol.metric != "loss":
        lines.append(f"{named(protocol.metric)} on the validation items:")
    lines += [_cell(cell, protocol, records) for cell in cells(protocol)]
    foreign = records.keys() - {run.id for run in runs}
    if foreign:
        lines.append(f"{len(foreign)} records belong to no run of this protocol")
    return "\n".join(lines)


def _cell(cell: Cell, protocol: Protocol, records: dict[str, Record]) -> str:
    grid = tuning(protocol, cell, records)
    losses = ", ".join(
        f"{rate:g}: {'-' if loss is None else f'{loss:.4f}'}"
        for rate, loss in zip(grid.rates, grid.losses, strict=True)
    )
    chosen = f"; chosen {grid.chosen:g}" if grid.chosen else ""
    return f"  {' '.join(cell)}: {losses}{chosen}{' (at an end of the grid)' if grid.at_edge else ''}"
