"""The choice of a run's layout by its compiled and its first step on the devices of this
process."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax

from nalora_jax.assembly.compilation import compile_ahead
from nalora_jax.config import RunConfig
from nalora_jax.kinds.record import Job
from nalora_jax.mesh import distributed, processes
from nalora_jax.models.config import ModelConfig
from nalora_jax.planner.decide import Compiled, decide
from nalora_jax.planner.estimates import Layout
from nalora_jax.planner.figures import measure_compiled, roofline
from nalora_jax.planner.layouts import fitting_layouts
from nalora_jax.planner.machines import describe_machine

log = logging.getLogger(__name__)


def accept_layout(
    config: RunConfig,
    base: ModelConfig,
    build: Callable[[RunConfig], Job],
    devices: Sequence[jax.Device] | None = None,
) -> Job:
    """Returns a run in a layout that the compiler and the devices accept.

    Layouts are tried in the order of `nalora_jax.planner.decide`. The step of a layout is compiled
    once, here; training reuses it. The first step is then run and its result dropped. If a device
    lacks memory for a layout, the next layout is tried, and weights and state are placed again. All
    processes compile the same program and so choose the same layout.

    Args:
      config: the run; axes of 0 and a remat of "auto" are chosen by this function.
      base: architecture of the base model.
      build: loads and assembles a run whose layout is decided.
      devices: default: all devices of all processes.

    Raises:
      NaloraError: no layout fits, or ``build`` raises it.
    """
    where = describe_machine(list(devices or jax.devices()))
    if where is None:  # a CPU or an unknown chip: the simplest mesh
        return build(config)
    candidates = fitting_layouts(config, base, where)
    if len(candidates) == 1:  # the layout is fixed by the settings
        log.info("mesh: %s", candidates[0])
        return build(candidates[0].into(config))
    jobs: list[Job] = []  # the last one that was built

    def attempt(layout: Layout) -> Compiled:
        """Builds and compiles the run in a layout, and runs a step if it fits.

        The job goes to ``jobs``, with the state from before that step.
        """
        jobs.clear()
        gc.collect()  # frees the last layout's arrays on the devices
        placed = layout.into(config)
        job = build(placed)
        assembly = job.assembly
        batches = job.data.batches()
        batch = distributed.make_global_batch(next(batches), assembly.mesh, rows_axis=1)
        batches.close()
        params = assembly.view(assembly.params)
        program = compile_ahead(assembly.step, params, assembly.state, batch)
        result = Compiled(0.0, True, 0.0)  # a step without figures counts as fitting
        if program is not None:
            figures = measure_compiled(program)
            seconds = roofline(figures, placed, base, where).seconds + layout.rollout
            result = Compiled(figures.memory, figures.fits(where.chip), seconds)
        if result.fits:
            lora = jax.tree.map(processes.fetch, assembly.state.lora)
            # donates the state
            jax.block_until_ready(assembly.step(params, assembly.state, batch))
            job = replace(
                job, assembly=replace(assembly, state=assembly.begin(lora, config.seed))
            )
        jobs.append(job)
        return result

    layout, _, tried = decide(candidates, where.chip.memory, attempt)
    if layout is not tried[-1][0]:
        attempt(layout)
    log.info("mesh: %s", layout)
    return jobs[0]
