"""Shardings of all arrays: ordered (path regex, PartitionSpec) rules for every tree of a run.

A spec names the *trailing* axes of a leaf, so one rule covers a kernel ``[in, out]``, its layer
stack ``[L, in, out]`` and a stack of experts ``[L, E, in, out]``. Leading axes are not split,
except the experts of a kernel or bias, which "fsdp" splits if it divides their number.

    layers/ffn/gate_proj/kernel [L, in, out]   P("fsdp", "tensor")  ->  P(None, "fsdp", "tensor")
    layers/ffn/gate_proj/a  [L, in, r]  P("fsdp", None)  ->  P(None, "fsdp")  in as the kernel's in
    layers/ffn/gate_proj/b  [L, r, out]  P(None, ("tensor", "fsdp"))  out over both

On a mesh with the axis "context", that axis and "fsdp" split the same dimensions.
The path of an optimizer's moment ends in the path of its parameter, so the same rules apply to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common import trees
from nalora_jax.common.devices import CONTEXT, FSDP, TENSOR, WEIGHT_AXES
from nalora_jax.errors import NaloraError
from nalora_jax.mesh import distributed
from nalora_jax.method.low_rank import Adapted, Dense, adapted_dense, parallel_dense
from nalora_jax.method.statistics import CHECK, COUNTS
from nalora_jax.models.config import ModelConfig
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.shardings import UNSHARDED, Shardings, mesh_axes, ways

Rules = Sequence[tuple[str, P]]


# Per projection: name, mesh axis of its input, mesh axis of its output.
_PROJECTIONS: tuple[tuple[str, str, str | None], ...] = (
    # outputs are split over tensor
    ("(q|q_b|k|v|kv_b|gate|up|in)_proj", FSDP, TENSOR),
    ("(o|down|out)_proj", TENSOR, FSDP),  # outputs are summed over tensor
    ("(router|bcx_proj)", FSDP, None),
    ("(q|kv)_a_proj", FSDP, None),  # latents of all heads
    ("in_proj_(qkvz?|z)", FSDP, TENSOR),
    ("in_proj_(a|b|ba)", FSDP, None),
)
# Frozen weights of experts and the number of their axes: [L, E, in, out] and [L, E, out].
_WEIGHTS = (
    (re.compile(r"_proj/kernel(/codes|/scales)?$"), 4),
    (re.compile(r"_proj/bias$"), 3),
)
_WHOLE = (TENSOR, FSDP)  # for axes that the train state splits over both


def _kernel_rules() -> Rules:
    """Returns the rules of the frozen weights of every projection."""
    rules: list[tuple[str, P]] = []
    for name, inner, outer in _PROJECTIONS:
        rules.append((rf"(^|/){name}/kernel(/codes|/scales)?$", P(inner, outer)))
        rules.append((rf"(^|/){name}/bias$", P(outer)))
        # initial adapters, if B != 0
        rules.append((rf"(^|/){name}/start_a$", P(inner, None)))
        rules.append((rf"(^|/){name}/start_b$", P(None, outer)))
    return rules


def _adapter_rules(places: Mapping[str | None, Any]) -> Rules:
    """Returns the rules of every projection's adapters, which are split over ``places`` of the
    kernel's axes."""
    rules: list[tuple[str, P]] = []
    for name, inner, outer in _PROJECTIONS:
        rules.append((rf"(^|/){name}/a$", P(places.get(inner), None)))
        rules.append((rf"(^|/){name}/b$", P(None, places.get(outer))))
        rules.append((rf"(^|/){name}/magnitude$", P(places.get(outer))))
    return rules


# Frozen weights. There is no trailing default, so that a weight without a rule is an error and not
# silently replicated.
_TABLE_RULES: Rules = (
    (r"(^|/)embed/embedding$", P(TENSOR, FSDP)),
    (r"(^|/)lm_head/kernel$", P(FSDP, TENSOR)),
)
PARAM_RULES: Rules = (
    *_kernel_rules(),
    *_TABLE_RULES,
    (r"(^|/)layer_embeddings/embedding$", P(TENSOR, FSDP)),
    (r"(^|/)layer_embeddings/projection/kernel$", P(FSDP, None)),
    (r"norm/(scale|bias)$", P()),
    (r"(^|/)(conv/weight|a_log|dt_bias)$", P()),
    (r"(^|/)(router/(correction|scale)|shared_gate/kernel)$", P()),
    # Encoders: weights that are small compared with their layers.
    (r"(^|/)tokens/embedding$", P(TENSOR, FSDP)),
    (r"(^|/)(positions|types)/embedding$", P()),
    (r"(^|/)(patches|pooler|projection)/(kernel|bias)$", P()),
    (
        r"(^|/)(class_token|line_break/feature|probe|sinks|taps|taps_bias"
        r"|attn_scale|ffn_scale|logit_scale|logit_bias)$",
        P(),
    ),
    (r"(^|/)tail/scale$", P()),
)

# The train state between steps: adapters, optimizer, gate EMAs, counters. Both mesh axes that split
# weights split one axis of each leaf, because moments of large ranks take gigabytes.
STATE_RULES: Rules = (
    # factored second moments (Adafactor) are small and no longer shaped like a weight
    (
        r"(^|/)v_(row|col)/",
        P(),
    ),
    *_adapter_rules({FSDP: FSDP, TENSOR: _WHOLE}),
    *_kernel_rules(),  # trained weights and their moments, split as they are read
    *_TABLE_RULES,  # fully trained tables and their moments
    # Memories of mechanisms and statistics of blocks end in an axis of channels, except counts and
    # checks.
    (rf"(^|/)({'|'.join(COUNTS)}|{CHECK}\w*)$", P()),
    (r"(^|/)(memory|gate_mask|gate_taps)/", P(_WHOLE)),
    (r"", P()),
)

# Adapters and masks within a step: gathered over fsdp once, before the layers, and split over
# tensor like their kernels.
STEP_RULES: Rules = (
    *_adapter_rules({TENSOR: TENSOR}),
    *_kernel_rules(),
    (r"(^|/)embed/embedding$", P(TENSOR, None)),
    (r"(^|/)lm_head/kernel$", P(None, TENSOR)),
    (r"(^|/)mask$", P(TENSOR)),
    (r"", P()),
)


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Returns a tree like ``tree`` with the `NamedSharding` of each leaf.

    Args:
      tree: arrays or ``ShapeDtypeStruct`` leaves.
      rules: ordered (regex, spec) pairs, searched in the slash-joined path; the first match wins. A
        spec covers the trailing axes of the leaf. A mesh axis that does not divide a dimension is
        dropped for that dimension only, and a leaf with fewer axes than its spec is replicated, so
        a layout is always valid, but may use more memory.

    Raises:
      NaloraError: a leaf that no rule matches.
    """
    uncovered = [
        path for path in trees.flatten(tree) if trees.first_match(rules, path) is None
    ]
    if uncovered:
        raise NaloraError(
            "sharding rules",
            expected="a rule for every array",
            found="none for " + ", ".join(uncovered),
            remedy="add a (regex, PartitionSpec) rule, "
            'or the trailing default ("", P()) to replicate what is left',
        )

    def place(path: str, leaf: Any) -> NamedSharding:
        match = trees.first_match(rules, path)
        assert match is not None
        spec = _by_expert(path, _over_context(match[1], mesh), leaf.shape, mesh)
        return NamedSharding(mesh, fit_spec(spec, leaf.shape, mesh))

    return trees.map_named(place, tree)


def step_shardings(
    mesh: Mesh,
    lora: Any,
    channels: Iterable[Sequence[int]],
    base: ModelConfig | None = None,
) -> Shardings:
    """Returns the shardings of the arrays within a step; none if each run has one device.

    Args:
      mesh: the run's devices.
      lora: the adapters, or their shapes.
      channels: channel shapes of the measured blocks, ``[layers, ..., d_ff]``.
      base: architecture of a decoder, whose head the loss reads.
    """
    rows = distributed.row_sharding(mesh)
    if rows is None:
        return UNSHARDED
    # Masks of all blocks share one layout; if "tensor" divides only some of them, none is split.
    masks = {fit_spec(P(TENSOR), shape, mesh) for shape in channels}
    mask = P()
    if len(masks) == 1:
        mask = masks.pop()
    head: tuple[NamedSharding, ...] = ()
    if base is not None:
        head = _head_shardings(base, mesh)
    adapters = shardings(lora, mesh, STEP_RULES)
    return Shardings(rows, rows, adapters, NamedSharding(mesh, mask), head)


def _head_shardings(base: ModelConfig, mesh: Mesh) -> tuple[NamedSharding, ...]:
    """Returns the layouts that the head's kernel takes before the loss.

    The loss reads a kernel that only "tensor" splits, along the vocabulary: it processes the batch
    in chunks, and a kernel that is split over "fsdp" would be gathered in each of them. An
    embedding, whose columns "fsdp" splits, is first split by rows: gathered columns would be padded
    to a TPU's tiles and transposed, 6.7 GB for the 2.8 GB of Gemma 4 31B over 32 chips.
    """
    shape = (base.d_model, base.vocab_size)
    layouts = [P(None, TENSOR)]
    if base.tie_embeddings:
        weights = tuple(axis for axis in (TENSOR, *WEIGHT_AXES) if axis in mesh.shape)
        # A tied head is the embedding, [vocab, d_model].
        shape = shape[::-1]
        layouts = [P(weights, None), P(TENSOR, None)]
    return tuple(NamedSharding(mesh, fit_spec(spec, shape, mesh)) for spec in layouts)


def _over_context(spec: P, mesh: Mesh) -> P:
    """Returns the spec on a mesh: if it has the axis "context", that splits what "fsdp" splits."""
    if CONTEXT not in mesh.shape:
        return spec

    def widen(axis: Any) -> Any:
        names: list[str] = []
        for name in mesh_axes(axis):
            if name == FSDP:
                names += WEIGHT_AXES
            else:
                names.append(name)
        return tuple(names) or None

    return P(*map(widen, spec))


def _by_expert(path: str, spec: P, shape: Sequence[int], mesh: Mesh) -> P:
    """Returns the spec of a leaf; "fsdp" splits experts of ``[L, E, (in,) out]`` if it divides
    them.

    The axis "context" splits the experts as well, or what "fsdp" splits in other kernels.
    """
    if not any(
        len(shape) == rank and pattern.search(path) for pattern, rank in _WEIGHTS
    ):
        return spec
    axes = tuple(name for name in WEIGHT_AXES if name in mesh.shape)
    for experts, inner in ((axes, None), (axes[:1], axes[1:] or None)):
        if shape[1] % ways(mesh, experts) == 0:
            replaced = {FSDP: inner, axes: inner}
            return P(experts, *(replaced.get(axis, axis) for axis in spec))
    return spec


def fit_spec(spec: P, shape: Sequence[int], mesh: Mesh) -> P:
    """Returns ``spec`` for the trailing axes of ``shape``; drops mesh axes that do not divide them.

    Example (mesh 2 x 4 x 1):
      >>> fit_spec(P("fsdp", "tensor"), (30, 576, 1536), mesh)
      PartitionSpec(None, 'fsdp', 'tensor')
      >>> fit_spec(P("tensor", "fsdp"), (50257, 766), mesh)    # 766 is no multiple of 4
      PartitionSpec('tensor',)
    """
    lead = len(shape) - len(spec)
    if lead < 0:
        return P()
    entries = [None] * lead + [
        _fit_axis(axis, size, mesh)
        for axis, size in zip(spec, shape[lead:], strict=True)
    ]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def _fit_axis(axis: Any, size: int, mesh: Mesh) -> Any:
    """Returns the longest prefix of one or several axes that divides ``size``, or None."""
    names = mesh_axes(axis)
    for count in range(len(names), 0, -1):
        if size % ways(mesh, names[:count]) == 0:
            if count == 1:
                return names[0]
            return tuple(names[:count])
    return None


# ---------------------------------------------------------------- split outputs


@parallel_dense.implements("split_outputs")
def split_outputs(
    x: jax.Array, layers: Sequence[Dense], numerics: Numerics
) -> list[Adapted]:
    """Computes `parallel_dense` on a mesh with "tensor": one sum over devices in the backward pass.

    Devices split the outputs of the layers, which have one input.
    """
    if numerics.platform.tensor == 1:
        return NotImplemented
    x, inner = _fork(x)
    return [adapted_dense(x, layer._replace(inner=inner), numerics) for layer in layers]


@jax.custom_vjp
def _fork(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x for frozen matmuls, in float32, and for adapters; their gradients are summed
    separately.

    If devices split outputs, the gradients of the frozen matmuls are partial sums. The compiler
    adds them before it reduces them over devices only without roundings and other summands in
    between.
    """
    return x.astype(jnp.float32), x


def _join(_: None, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    of_frozen, of_adapters = gradients
    return (of_frozen.astype(of_adapters.dtype) + of_adapters,)


_fork.defvjp(lambda x: (_fork(x), None), _join)
