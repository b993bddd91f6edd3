"""Initial adapters of a run: read from disk, or computed from its kernels or the gradient of its
first batches.

LoRA-GA's kernels are the base's kernels minus the initial update of its adapters. Another machine,
or another number of devices, would compute singular vectors with other signs, and so other kernels.
Therefore a resumed run reads the initial adapters:

    <output>/start/adapter.safetensors   the adapters before the first step, by path
                  /digests.json          SHA-256 of that file

Gradient-subspace initialization (``--lora.init gradient`` and ``lora_ga``):

The gradient of an adapted kernel over the first batches is ``G = sum over tokens of x^T delta``,
``[d_in, d_out]``, with ``delta`` the cotangent of the projection's output. Among all A of rank r
with orthogonal columns of a fixed length, the top r left singular vectors of G give B the largest
gradient, ``A^T G``. With "gradient", B starts at zero. So the model starts as the base, the kernels
are not lowered, and the trained adapter is plain LoRA.

LoRA-GA (arXiv 2407.05000) uses both sides of the decomposition ``G = U S V^T``: ``A = c U[:, :r]``
of the first r triplets and ``B = c V[:, r:2r]^T`` of the next r, ``c = d_out^(1/4) / gamma^(1/2)``.
Up to its length, the first gradient step then changes ``A B`` by the best approximation of rank 2r
to G. The kernel is lowered by ``s A B`` (`start_from`), so that this model, too, starts as the
base.

G is never formed. An adapter (A, B) at scale 1 has the gradients ``dB = A^T G`` and ``dA = G B^T``,
and does not change the model's outputs as long as A or B is zero. So subspace iteration (Halko,
Martinsson and Tropp, arXiv 0909.4061) needs only the training step's gradients, and the memory of
an adapter that is a few columns wider:

    A = random, B = 0         dB = A^T G           Q = orth(dB^T)
    A = 0,      B = Q^T       dA = G Q             P = orth(dA)        } twice
    A = P,      B = 0         dB = P^T G           Q = orth(dB^T)      }
    P^T G = U S V^T           left singular vectors of G: P U

Cost: five passes over the batches, each about a training step per batch.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from nalora_jax.assembly.program import Assembly, measured_blocks, next_token
from nalora_jax.common import digests, trees
from nalora_jax.common.folders import START, RunFolder, new_folder
from nalora_jax.data.pipeline import TrainingRows
from nalora_jax.errors import NaloraError
from nalora_jax.loading.initial_adapter import read_initial, warn_if_changed
from nalora_jax.mesh import distributed, processes, sharding
from nalora_jax.method import statistics
from nalora_jax.method.low_rank import find_gates
from nalora_jax.method.step import (
    Batch,
    StepConfig,
    accumulate,
    micro_gradients,
    reduce_stats,
)
from nalora_jax.method.transform import Mechanisms
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import depths, projection_shapes
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.weights.adapter_forms import (
    difference_as_lora,
    lower_kernels,
    pissa_split,
    remaining_ranks,
)
from nalora_jax.weights.model_files import LoadedModel

log = logging.getLogger(__name__)
_FILE = "adapter.safetensors"
GRADIENT = ("gradient", "lora_ga")  # the values of --lora.init that read batches


def prepare_start(
    assembly: Assembly, loaded: LoadedModel, data: TrainingRows, output: RunFolder
) -> Assembly:
    """Returns the assembly with the initial adapters that the run's settings ask for.

    They are the principal components of the kernels (PiSSA), columns in the subspace of the
    gradient of the run's first batches, the adapter that the run continues, or the adapters of the
    assembly. A resumed run gets its adapters from its checkpoint later; it lowers LoRA-GA's kernels
    by the stored initial adapters.

    Args:
      assembly: the run's program and weights.
      loaded: its base model.
      data: its rows.
      output: its folder.

    Raises:
      NaloraError: the initial adapters cannot be written or read, or are damaged; see also
        `nalora_jax.loading.initial_adapter.read_initial`.
    """
    config = assembly.config
    folder = output.folder / START
    if config.lora.init == "pissa":
        return split_components(assembly)
    if config.lora.init in GRADIENT:
        if output.resumes:
            if config.lora.init == "gradient":
                return assembly
            # Lowers the kernels by the same bits as before; the checkpoint has the current
            # adapters.
            return start_from(assembly, _read(folder, assembly))
        started = time.perf_counter()
        lora = first_adapters(assembly, loaded.config, data, config.seed)
        count = config.lora.gradient_batches
        seconds = time.perf_counter() - started
        log.info("adapters start in the gradient of %d batches: %.1f s", count, seconds)
        if config.lora.init == "gradient":
            return replace(assembly, state=assembly.begin(lora, config.seed))
        assembly = start_from(assembly, lora)
        processes.run_on_first_process(lambda: _write(folder, assembly.initial))
        return assembly
    if config.adapter and output.resumes:
        warn_if_changed(config)
    elif config.adapter:
        lora = read_initial(config, loaded)
        log.info(
            "adapters start from %s (SHA-256 %s...)",
            config.adapter,
            config.adapter_sha256[:16],
        )
        return replace(assembly, state=assembly.begin(lora, config.seed))
    return assembly


def _with_starts(params: Any, lora: Any, mesh: Mesh) -> Any:
    """Returns ``params`` with the gates' initial adapters, relative to which updates are
    measured."""
    leaves = trees.flatten(params)
    adapters = trees.flatten(lora)
    starts = {}
    for gate in find_gates(lora):
        starts[f"{gate}/start_a"] = adapters[f"{gate}/a"]
        starts[f"{gate}/start_b"] = adapters[f"{gate}/b"]
    # They are frozen, so they have the layout of weights.
    start_shardings = sharding.shardings(starts, mesh, sharding.PARAM_RULES)
    return trees.unflatten(leaves | jax.device_put(starts, start_shardings))


def start_from(assembly: Assembly, lora: Any) -> Assembly:
    """Returns the assembly with initial adapters ``lora``, non-zero B, on lowered kernels.

    The kernels are lowered by the initial update of ``lora``, so the model's outputs stay the same.
    The step function is shared, and must not be compiled yet: its params now include the initial
    adapters of the gates.
    """
    # a resumed run must start from the same bits
    initial = jax.tree.map(processes.fetch, lora)
    return _lowered(
        assembly, lower_kernels(assembly.params, initial, assembly.spec), initial
    )


def split_components(assembly: Assembly) -> Assembly:
    """Returns the assembly with PiSSA's initial adapters, the principal components of its kernels;
    as `start_from`."""
    params, lora = pissa_split(assembly.params, assembly.spec)
    return _lowered(assembly, params, jax.tree.map(processes.fetch, lora))


def _lowered(assembly: Assembly, params: Any, initial: Any) -> Assembly:
    """Returns the assembly with initial adapters in host memory on kernels that were lowered by
    them."""
    params = _with_starts(params, initial, assembly.mesh)
    state = assembly.begin(initial, assembly.config.seed)
    return replace(assembly, params=params, state=state, initial=initial)


def exportable_adapter(assembly: Assembly, lora: Any) -> tuple[Any, AdapterSpec]:
    """Returns the trained adapter as plain LoRA of the original base, in host memory.

    It is the adapter, its difference from its non-zero initialization, or the components that
    AdaLoRA kept.
    """
    lora = jax.tree.map(processes.fetch, lora)
    if assembly.spec.adalora:
        return remaining_ranks(lora, assembly.spec)
    if assembly.initial is None:
        return lora, assembly.spec
    return difference_as_lora(lora, assembly.initial, assembly.spec)


def first_adapters(
    assembly: Assembly, base: ModelConfig, data: TrainingRows, seed: int
) -> dict[str, Any]:
    """Returns `gradient_adapters` of the first ``lora.gradient_batches`` batches of ``data``."""
    batches = data.batches()
    try:
        first_batches = itertools.islice(batches, assembly.config.lora.gradient_batches)
        first = list(distributed.global_batches(first_batches, assembly.mesh))
    finally:
        batches.close()
    return gradient_adapters(assembly, base, first, seed)


def _write(folder: Path, initial: Mapping[str, Any]) -> None:
    """Writes the initial adapters and their digest; the folder appears complete or not at all."""
    with new_folder(folder) as scratch:
        leaves = {
            path: np.ascontiguousarray(leaf)
            for path, leaf in trees.flatten(initial).items()
        }
        save_file(leaves, scratch / _FILE)
        digests.write_digests(scratch)


def _read(folder: Path, assembly: Assembly) -> dict[str, Any]:
    """Reads the adapters that `_write` wrote, and checks them against the assembly's."""
    leaves = {}
    try:
        damage = digests.find_damage(folder)
        if damage is None:
            leaves = load_file(folder / _FILE)
    except (OSError, SafetensorError) as error:
        damage = getattr(error, "strerror", None) or str(error)
    shapes = {
        path: leaf.shape for path, leaf in trees.flatten(assembly.state.lora).items()
    }
    if damage is None and {path: leaf.shape for path, leaf in leaves.items()} != shapes:
        damage = "adapters of other projections or shapes"
    if damage is not None:
        raise NaloraError(
            str(folder),
            expected="the adapters that the run started from",
            found=damage,
            remedy="restore that folder from a copy; without it the run cannot go on",
        )
    return trees.unflatten(
        {path: jax.numpy.asarray(leaf) for path, leaf in leaves.items()}
    )


_ITERATIONS = 2  # of the subspace iteration; see the two lines marked "twice" above
# Mean length of A's columns in default LoRA: d_in entries, uniform in +-1/sqrt(d_in).
_COLUMN_NORM = 1 / math.sqrt(3.0)
# LoRA-GA's gamma ("stable_gamma") in its authors' code and in PEFT.
_STABLE_GAMMA = 16.0

# by path of the projection, ``[layers, (experts,) rows, columns]``
Matrices = dict[str, jax.Array]


def gradient_adapters(
    assembly: Assembly, base: ModelConfig, batches: Sequence[Batch], seed: int
) -> dict[str, Any]:
    """Returns new adapters whose A holds the gradient's top left singular vectors.

    With ``--lora.init gradient``, the columns have the mean length of LoRA's columns, and B is
    zero. With ``lora_ga``, B holds right singular vectors, and the caller has to lower the kernels
    (`start_from`).

    Args:
      assembly: the run's assembly.
      base: architecture of its base model.
      batches: batches that the gradient is summed over, on the run's mesh.
      seed: seed of the initial random subspace and of the permuted weights.

    Returns:
      A tree like the result of `nalora_jax.models.adapters.init_lora`.
    """
    spec = assembly.spec
    lora_config = assembly.config.lora
    shapes = projection_shapes(base)
    ranks = {
        path: target.rank * (2 if lora_config.init == "lora_ga" else 1)
        for path, target in spec.targets
    }
    # Oversampled by half, at least by 8 columns, as randomized SVDs need for accurate vectors.
    wide = {
        path: min(count + max(8, count // 2), *shapes[path][-2:])
        for path, count in ranks.items()
    }
    search = _Search(assembly, base, wide, batches)
    key = jax.random.key(seed)
    layers = depths(base)
    a = {
        path: jax.random.normal(
            # [layers, (experts,) d_in, width]
            jax.random.fold_in(key, i),
            (layers[path], *shapes[path][:-1], width),
        )
        for i, (path, width) in enumerate(wide.items())
    }
    # The names of the module's docstring: `a` is A or P, `rows` are dB.
    rows, slopes = search.rows(a)
    weights = _weights(
        lora_config.gradient_weights, slopes, spec, jax.random.fold_in(key, len(wide))
    )
    rows = _weighted(rows, weights)
    for _ in range(_ITERATIONS):
        columns = search.columns(
            _weighted(
                {path: _orthonormal_rows(row) for path, row in rows.items()}, weights
            )
        )
        a = {path: jnp.linalg.qr(column)[0] for path, column in columns.items()}
        rows = _weighted(search.rows(a)[0], weights)
    parts = {
        # The rows are P^T G, so this is the small decomposition of the last line.
        path: jnp.linalg.svd(row, full_matrices=False)
        for path, row in rows.items()
    }
    # Left singular vectors of G: P U, [layers, ..., d_in, k].
    left = {
        path: jnp.matmul(a[path], u, precision="highest")
        for path, (u, _, _) in parts.items()
    }
    return _place(
        left, {path: vt for path, (_, _, vt) in parts.items()}, assembly, base, seed
    )


class _Search:
    """Matmuls with G, computed as gradients of adapters at scale 1 with A = 0 or B = 0."""

    def __init__(
        self,
        assembly: Assembly,
        base: ModelConfig,
        wide: Mapping[str, int],
        batches: Sequence[Batch],
    ) -> None:
        """Compiles nothing yet; makes the gradients' function for adapters of these ranks.

        Args:
          assembly, base, batches: see `gradient_adapters`.
          wide: rank of the searched subspace by path of the projection.
        """
        layers = depths(base)
        targets = tuple(
            (path, TargetSpec.even(width, layers[path])) for path, width in wide.items()
        )
        self._spec = AdapterSpec(targets)
        self._batches = batches
        self._params = assembly.view(assembly.params)
        model = assembly.model.clone(adapters=self._spec)
        mesh = assembly.mesh
        # Statistics are measured without any mechanism, so no mask acts on the gradients.
        none = Mechanisms((), base.activation)
        blocks = {
            path: shape
            for path, (shape, _) in measured_blocks(base, self._spec).items()
        }
        config = StepConfig(none, blocks, model.shardings)
        objective = next_token(base, model, assembly.config.compute)
        evaluate = micro_gradients(objective, config)

        def gradients(params: Any, lora: Any, batch: Batch) -> dict[str, Any]:
            """Returns the first half of a step, without dropout: sums over target tokens."""
            sums = accumulate(
                lambda b, k: evaluate(params, lora, {}, b, k), batch, jax.random.key(0)
            )
            stats = reduce_stats(
                sums["stats"], statistics.STANDARD, config.shardings.rows
            )
            return sums | {"stats": stats}

        self._sums = jax.jit(
            gradients, compiler_options=distributed.compiler_options(mesh)
        )
        # Leaves that a call does not set, e.g. B in `rows`, are zero.
        self._zeros = trees.flatten(init_lora(base, self._spec, jax.random.key(0)))
        self._zeros = {path: jnp.zeros_like(leaf) for path, leaf in self._zeros.items()}

    def rows(self, a: Matrices) -> tuple[Matrices, dict[str, jax.Array]]:
        """Returns ``A^T G``, ``[layers, ..., k, d_out]``, for A of ``[layers, ..., d_in, k]``; and
        the mean slope of every gate channel by block, ``[layers, ..., d_ff]``."""
        total = self._total({f"{path}/a": value for path, value in a.items()})
        slopes = {
            block: sums["slope"] / jnp.maximum(sums["tokens"], 1.0)[..., None]
            for block, sums in total["stats"].items()
        }
        grads = trees.flatten(total["grads"])
        return {path: grads[f"{path}/b"] for path in a}, slopes

    def columns(self, b: Matrices) -> Matrices:
        """Returns ``G B^T``, ``[layers, ..., d_in, k]``, for B of ``[layers, ..., k, d_out]``."""
        grads = trees.flatten(
            self._total({f"{path}/b": value for path, value in b.items()})["grads"]
        )
        return {path: grads[f"{path}/a"] for path in b}

    def _total(self, leaves: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Returns the sums of a step over all batches for adapters with these leaves, others 0.

        Gradients are divided by the number of target tokens.
        """
        lora = trees.unflatten(self._zeros | dict(leaves))
        total: dict[str, Any] = {}
        for batch in self._batches:
            sums = self._sums(self._params, lora, batch)
            sums = {name: sums[name] for name in ("grads", "stats", "target_tokens")}
            if total:
                sums = jax.tree.map(jnp.add, total, sums)
            total = sums
        tokens = jnp.maximum(total["target_tokens"], 1.0)
        return total | {"grads": jax.tree.map(lambda g: g / tokens, total["grads"])}


def _weights(
    kind: str, slopes: Mapping[str, jax.Array], spec: AdapterSpec, key: jax.Array
) -> Matrices:
    """Returns weights of the gates' output channels, ``[layers, ..., d_out]`` with mean 1 per
    layer.

    They are the mean slopes of the channels ("permuted": in random order). A projection without an
    entry has weight 1.
    """
    if kind == "ones":
        return {}
    gates = find_gates(trees.unflatten({f"{path}/b": 0 for path, _ in spec.targets}))
    weights = {}
    for index, (gate, block) in enumerate(gates.items()):
        weight = slopes[block] / jnp.maximum(
            jnp.mean(slopes[block], axis=-1, keepdims=True), 1e-30
        )
        if kind == "permuted":
            weight = jax.random.permutation(
                jax.random.fold_in(key, index), weight, axis=-1, independent=True
            )
        weights[gate] = weight
    return weights


def _weighted(rows: Matrices, weights: Matrices) -> Matrices:
    """Multiplies the columns of ``[..., k, d_out]`` by their weights."""
    return rows | {
        path: rows[path] * weight[..., None, :] for path, weight in weights.items()
    }


def _orthonormal_rows(matrix: jax.Array) -> jax.Array:
    """Returns an orthonormal basis of the row space of ``[..., k, d]``, of the same shape."""
    return jnp.swapaxes(jnp.linalg.qr(jnp.swapaxes(matrix, -1, -2))[0], -1, -2)


def _place(
    left: Matrices, right: Matrices, assembly: Assembly, base: ModelConfig, seed: int
) -> dict[str, Any]:
    """Puts the vectors into new adapters, with zeros beyond each layer's rank.

    Args:
      left: ``[layers, ..., d_in, k]``, most important first.
      right: ``[layers, ..., k, d_out]``.
    """
    leaves = trees.flatten(
        init_lora(base, assembly.spec, jax.random.key(seed), assembly.params)
    )
    lora_ga = assembly.config.lora.init == "lora_ga"
    for path, target in assembly.spec.targets:
        a = leaves[f"{path}/a"]
        b = leaves[f"{path}/b"]
        used = target.used((*a.shape[:-2], target.rank))
        length = _COLUMN_NORM
        if lora_ga:
            # The factor c of the module's docstring.
            length = b.shape[-1] ** 0.25 / math.sqrt(_STABLE_GAMMA)
        leaves[f"{path}/a"] = jnp.where(
            used[..., None, :], length * left[path][..., : target.rank], 0.0
        )
        if lora_ga:
            # Triplets r to 2r, r the rank of a layer: [layers, rank] -> [layers, 1, ..., rank, 1]
            second = np.array(target.ranks)[:, None] + np.arange(target.rank)
            second = second.reshape(
                len(target.ranks), *(1,) * (a.ndim - 3), target.rank, 1
            )
            rows = jnp.take_along_axis(right[path], second, axis=-2)
            leaves[f"{path}/b"] = jnp.where(used[..., None], length * rows, 0.0)
    return trees.unflatten(leaves)
