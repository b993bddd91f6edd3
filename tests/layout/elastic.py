"""One stage of a run that moves between machines: some steps on a mesh, from the last checkpoint to the next one.

python -m tests.layout.elastic FOLDER STEPS     # as one of several processes, on all their devices
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import jax

from nalora_jax.config import MeshConfig, RunConfig
from nalora_jax.data.pipeline import train_data
from nalora_jax.layout import distributed
from nalora_jax.train.assembly import assemble
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.weights.base import load_model
from tests import tiny

Record = tuple[int, str, float]  # step, digest of its global batch, loss


def advance(config: RunConfig, steps: int, devices: int | None = None) -> list[Record]:
    """``steps`` more steps on the mesh of ``config``, over the first ``devices`` or all."""
    mesh = distributed.make_mesh(config.mesh, jax.devices()[:devices])
    loaded = load_model(config.model, dtype="float32", mesh=mesh)
    assembly = assemble(config, loaded.config, loaded.params, mesh)
    size = config.train.batch_size
    rows = distributed.process_rows(mesh, size).tolist()
    batches = train_data(
        config.data, loaded.tokenizer, batch_size=size, seed=config.seed, rows=rows
    ).batches()
    folder = Path(config.output) / "checkpoints"
    done: list[Record] = []
    with Checkpointer(folder, fingerprint=loaded.fingerprint, config=config.to_dict()) as checkpoints:
        state = assembly.state
        if checkpoints.latest_step() is not None:
            state, position = checkpoints.restore("latest", assembly.state)
            batches.set_state(position)
        for _ in range(steps):
            batch = distributed.make_global_batch(next(batches), mesh, rows_axis=1)
            tokens = hashlib.sha256(distributed.fetch(batch["tokens"]).tobytes()).hexdigest()
            state, metrics = assembly.step(assembly.view(assembly.params), state, batch)
            done.append((int(state.step), tokens, float(metrics["loss"])))
        checkpoints.save(int(state.step), state, batches.get_state())
    batches.close()
    return done


if __name__ == "__main__":
    assert distributed.initialize_distributed()
    base = tiny.make_config(Path(sys.argv[1]), steps=12)
    for step, tokens, loss in advance(replace(base, mesh=MeshConfig(-1, 1, 1)), int(sys.argv[2])):
        print("STEP", step, tokens, repr(loss))
