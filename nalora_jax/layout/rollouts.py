"""How the samples of a step with rewards are divided among the shards of a mesh, and an estimate of their time."""

from __future__ import annotations

from nalora_jax.config import RunConfig
from nalora_jax.layout.estimates import active_parameters, attending, summed_bytes
from nalora_jax.layout.machines import Topology
from nalora_jax.models.config import ModelConfig

# Rows that are generated at once on each shard of a batch.
ROWS = 64


def program_shape(prompts: int, samples: int, shards: int, rows: int = ROWS) -> tuple[int, int, int]:
    """Returns how groups are divided among programs and shards.

    A mesh with more shards than prompts divides each group into parts, which process the same prompt.

    Args:
      prompts: of a step.
      samples: of a prompt.
      shards: parts that the mesh splits a batch into.
      rows: that are generated at once on each shard.

    Returns:
      Prompts of one program, its prompts with repetitions, a multiple of ``shards``, and samples of each.

    Example:
      >>> program_shape(64, 16, 256), program_shape(64, 16, 8), program_shape(8, 8, 1)
      ((64, 256, 4), (32, 32, 16), (8, 8, 8))
    """
    divisors = (n for n in range(1, samples + 1) if samples % n == 0)
    parts = next((n for n in divisors if n * prompts >= shards), samples)
    of_shard = min(max(rows * parts // samples, 1), -(-prompts * parts // shards))
    return of_shard * shards // parts, of_shard * shards, samples // parts


def rollout_estimate(
    config: RunConfig,
    base: ModelConfig,
    where: Topology,
    *,
    shards: int,
    tensor: int,
    weights: float,
    gathering: float,
) -> tuple[float, float]:
    """Returns the least seconds a step of rollouts without an early end, and a chip's bytes of keys and values.

    Args:
      config: a run with rewards.
      base: architecture of its model.
      where: the machine.
      shards: parts that the mesh splits a batch into.
      tensor: devices that split the weights of a layer and its heads.
      weights: bytes that a chip reads in a pass through the model.
      gathering: seconds in which it receives the part of them that other chips have.
    """
    rl, chip = config.rl, where.chip
    prompts = config.train.batch_size // rl.samples
    at_once, count, samples = program_shape(prompts, rl.samples, shards)
    rows = count // shards * samples
    keys = (
        sum(2 * of.n_layers * of.n_kv_heads * of.head_dim for of in attending(base))
        * config.compute.itemsize
    )
    cache = rows * config.data.max_length * keys / tensor

    def seconds(tokens: float, read: float) -> float:
        flops = 2 * active_parameters(base) * tokens / tensor
        # Each layer sums the results of attention and of the FFN: two of the four sums of an update.
        sums = (
            summed_bytes(base, tokens, tensor, "dots", config.compute.itemsize) / 2 / where.inbound(tensor)
        )
        return max(flops / chip.matrix_rate, (weights + read) / chip.bandwidth) + gathering + sums

    longest = config.data.max_length - rl.max_new_tokens
    program = seconds(count / shards * longest, 0.0) + rl.max_new_tokens * seconds(rows, cache)
    return -(-prompts // at_once) * program / rl.updates, cache
