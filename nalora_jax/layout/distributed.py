"""Devices and processes: the mesh, array shardings, global batches and multi-host runs.

Names of the mesh's axes are in `nalora_jax.layout.mesh`.
"""

from nalora_jax.layout.batches import (
    global_batches,
    make_global_batch,
    process_rows,
    rows_of_processes,
)
from nalora_jax.layout.compiler import compiler_options
from nalora_jax.layout.mesh import (
    batch_shards,
    check_axes,
    check_heads,
    check_tensor,
    context_of,
    context_size,
    devices_per_run,
    make_mesh,
    platform_of,
    platform_of_step,
    resolve_sizes,
    row_sharding,
    shown_axes,
    smallest_mesh,
    unless_single,
)
from nalora_jax.layout.processes import (
    check_lost_peer,
    fetch,
    initialize_distributed,
    lost_peers_named,
    on_first_process,
    tell_all,
)
from nalora_jax.layout.sharding import (
    PARAM_RULES,
    STATE_RULES,
    STEP_RULES,
    Rules,
    bytes_per_device,
    fit_spec,
    shardings,
)

__all__ = [
    "PARAM_RULES",
    "STATE_RULES",
    "STEP_RULES",
    "Rules",
    "batch_shards",
    "bytes_per_device",
    "check_axes",
    "check_heads",
    "check_lost_peer",
    "check_tensor",
    "compiler_options",
    "context_of",
    "context_size",
    "devices_per_run",
    "fetch",
    "fit_spec",
    "global_batches",
    "initialize_distributed",
    "lost_peers_named",
    "make_global_batch",
    "make_mesh",
    "on_first_process",
    "platform_of",
    "platform_of_step",
    "process_rows",
    "resolve_sizes",
    "row_sharding",
    "rows_of_processes",
    "shardings",
    "shown_axes",
    "smallest_mesh",
    "tell_all",
    "unless_single",
]
