"""Every kind of layer on every mesh that splits rows, against whole rows on one device, as a table.

    python -m tests.context_matrix

Five steps each in float32, of packed rows with padding. Takes some ten minutes on two cores; the test suite has the
diagonal of this table (tests/layout/test_context.py).
"""

from __future__ import annotations

import os

from tests import xla_options

os.environ["XLA_FLAGS"] = xla_options.flags(8)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "32")

import jax
import numpy as np

from nalora_jax.common import trees
from nalora_jax.config import MeshConfig
from tests.layout.test_context import RAWS, on_one_device, trained

MESHES = {
    "context 2": MeshConfig(1, 1, 1, 2),
    "context 4": MeshConfig(1, 1, 1, 4),
    "context 8": MeshConfig(1, 1, 1, 8),
    "fsdp 2 x context 4": MeshConfig(1, 2, 1, 4),
    "data 2 x context 2 x tensor 2": MeshConfig(2, 1, 2, 2),
}
LIMITS = 2e-6, 1e-3  # of losses, relative; of adapters, relative to the largest element of each array


def errors(kind: str, mesh: MeshConfig) -> tuple[float, float]:
    """Returns the largest relative errors of losses and of adapters."""
    (state, history), (expected, of_one) = trained(kind, mesh), on_one_device(kind)
    losses = np.max(
        [abs(ours["loss"] / theirs["loss"] - 1) for ours, theirs in zip(history, of_one, strict=True)]
    )
    ours, theirs = trees.flatten(state.lora), trees.flatten(expected.lora)
    adapters = np.max(
        [np.max(np.abs(ours[path] - leaf)) / np.max(np.abs(leaf)) for path, leaf in theirs.items()]
    )
    return float(losses), float(adapters)


def main() -> None:
    """Prints the table; the exit status is 1 if an error is above its limit."""
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)
    print("| layers | mesh | loss | adapters |\n|---|---|---|---|")
    failed = False
    for kind in RAWS:
        for name, mesh in MESHES.items():
            found = errors(kind, mesh)
            failed |= not all(error <= limit for error, limit in zip(found, LIMITS, strict=True))
            print(f"| {kind} | {name} | {found[0]:.1e} | {found[1]:.1e} |", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
