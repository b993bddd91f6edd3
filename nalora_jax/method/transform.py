"""NA-LoRA as an optax transform, which owns the averages of the gates.

    inner (clip, preconditioner, weight decay, learning rate) -> `scale_by_gates`

`scale_by_gates` multiplies the updates of every gate's B by the factors of the rules, one for each
channel. It acts after the preconditioner, because Adam undoes a constant factor before it. Its
state is a `GateState`: the averages of the statistics. A step reads the factors, which were
computed from the averages after the step before, and then updates the averages with its own
statistics.

`nalora` wraps an inner optimizer for adapters with gate leaves (`gate_leaves`): the gradient of
their ``taps`` is the statistics (`nalora_jax.method.statistics.observe`), and their ``mask`` weighs
the gradient of A in the next step. A training loop of plain LoRA then trains NA-LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from nalora_jax.common import trees
from nalora_jax.errors import NaloraError
from nalora_jax.method import activations, statistics
from nalora_jax.method.rules import PLACES, Context, Mechanism, Memory, make

# By place (`nalora_jax.method.rules.PLACES`), then by block: [..., d_ff] float32.
RuleFactors = dict[str, dict[str, Array]]
DEFAULT = ("curvature_cap",)
# names of the leaves of a gate next to A and B
TAPS = "taps"
MASK = "mask"


@dataclass(frozen=True)
class Mechanisms:
    """The rules of a run, each with the label of its memory and its metrics."""

    entries: tuple[tuple[str, Mechanism], ...]
    activation: str
    total_steps: int = 0  # of the run; 0 if unknown
    seed: int = 0  # of the run
    others: tuple[
        tuple[str, str], ...
    ] = ()  # blocks with another activation: (path, its name)
    # Orders of the channels by (label, path), in place of the mechanisms' own permutations.
    orders: Mapping[tuple[str, str], Array] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Raises a NaloraError if a rule has an unknown statistic or place."""
        for _, mechanism in self.entries:
            for name in mechanism.statistics:
                statistics.get_statistic(name)
            unknown = sorted(set(mechanism.places) - set(PLACES))
            if unknown:
                field = f"mechanism {mechanism.name}"
                raise NaloraError(field, expected=f"places of {PLACES}", found=unknown)

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistics that blocks measure for them, sorted."""
        return tuple(sorted({name for _, m in self.entries for name in m.statistics}))

    @property
    def places(self) -> tuple[str, ...]:
        """The places where at least one of them acts."""
        used = {place for _, rule in self.entries for place in rule.places}
        return tuple(place for place in PLACES if place in used)

    def activation_of(self, block: str) -> str:
        """Returns the name of a block's activation."""
        return dict(self.others).get(block, self.activation)

    def context(self, count: Array, block: str) -> Context:
        """Returns the arguments of the rules at a step."""
        partition = activations.partition(self.activation_of(block))
        return Context(count, self.total_steps, partition, block, self.seed)


def make_mechanisms(
    rules: Sequence[str | Mechanism],
    *,
    activation: str,
    total_steps: int = 0,
    seed: int = 0,
) -> Mechanisms:
    """Returns the mechanisms of a run.

    Args:
      rules: in the order in which their factors are multiplied: ``"NAME"`` or
        ``"NAME:setting=value,..."`` as in ``RunConfig.mechanisms``, or rules themselves.
      activation: activation function of the gates.
      total_steps: steps of the run, for rules that depend on its progress.
      seed: seed of the run, for rules that draw random numbers.

    Raises:
      NaloraError: an unknown rule or setting, a value out of range, or an unknown place.
    """
    mechanisms = [make(rule) for rule in rules]
    names = labels([(mechanism.label, mechanism.name) for mechanism in mechanisms])
    entries = tuple(zip(names, mechanisms, strict=True))
    return Mechanisms(entries, activation, total_steps=total_steps, seed=seed)


def labels(names: Sequence[tuple[str, str]]) -> list[str]:
    """Returns distinct labels of rules, given the label and the name of each.

    A rule has its label if no earlier rule has it, else its name; repeated names are numbered,
    starting at 2.
    """
    distinct: list[str] = []
    for label, name in names:
        chosen = label
        if label in ("", *distinct):
            chosen = name
        number = 2
        while chosen in distinct:
            chosen = f"{name}_{number}"
            number = number + 1
        distinct.append(chosen)
    return distinct


# ---------------------------------------------------------------- averages


class GateState(NamedTuple):
    """The averages of the statistics by path of the block that measures them ("layers/ffn").

    Channel axes are [L, d_ff], of mixtures of experts [L, E, d_ff], of an unstacked block [d_ff].
    """

    # By label and block: averages by statistic, float32 [..., d_ff] or [..., parts, d_ff].
    memory: dict[str, dict[str, Memory]]
    updates: dict[str, Array]  # [...] int32: steps with tokens of each layer or expert
    # Optimizer steps: [] int32.
    count: Array  # type: ignore[assignment]  # shadows tuple.count, which is unused here


def init_gate_state(
    shapes: Mapping[str, tuple[int, ...]], mechanisms: Mechanisms
) -> GateState:
    """Returns the averages before the first step.

    Args:
      shapes: channel shape of each block, e.g. ``{"layers/ffn": (L, d_ff)}``.
      mechanisms: of the run.
    """
    memory = {}
    for label, mechanism in mechanisms.entries:
        memory[label] = {path: mechanism.init(shape) for path, shape in shapes.items()}
    updates = {}
    for path, shape in shapes.items():
        updates[path] = jnp.zeros(shape[:-1], jnp.int32)
    return GateState(memory, updates, count=jnp.zeros((), jnp.int32))


def update_gate_state(
    state: GateState, stats: Any, mechanisms: Mechanisms
) -> GateState:
    """Returns the averages after one optimizer step.

    A layer or expert without a token keeps its averages and its number of updates.

    Args:
      state: before the step.
      stats: the step's sums (nested or by block), added up over micro-batches and hosts, with the
        sums of cotangents (`nalora_jax.method.statistics.scale_to_targets`).
      mechanisms: of the run.

    Raises:
      NaloraError: a block's statistics are missing.
    """
    flat = trees.flatten(stats)
    updates = {}
    memory = {label: dict(blocks) for label, blocks in state.memory.items()}
    for path, before in state.updates.items():
        has_tokens = _leaf(flat, path, "tokens") > 0
        updates[path] = before + has_tokens.astype(jnp.int32)
        for label, mechanism in mechanisms.entries:
            counts = (
                statistics.get_statistic(name).count for name in mechanism.statistics
            )
            names = sorted({*mechanism.statistics, *counts})
            sums = {name: _leaf(flat, path, name) for name in names}
            memory[label][path] = mechanism.advance(
                memory[label][path], sums, updates[path]
            )
    return GateState(memory, updates, state.count + 1)


def _leaf(flat: Mapping[str, Array], path: str, name: str) -> Array:
    """Returns the sum ``name`` of the block at ``path``; raises a NaloraError if it is missing."""
    key = f"{path}/{name}".removeprefix("/")
    if key not in flat:
        paths = ", ".join(sorted(flat)) or "nothing"
        raise NaloraError(
            "gate_stats",
            expected=f"a leaf {key}",
            found=paths,
            remedy="measure with the rules of the optimizer (`taps`)",
        )
    return flat[key]


# ---------------------------------------------------------------- factors


def own_factors(
    state: GateState,
    mechanisms: Mechanisms,
    updates_of: Mapping[str, Array] = MappingProxyType({}),
) -> dict[str, dict[str, Array]]:
    """Returns each mechanism's factors for the next step by label and block, not normalized.

    They are [..., d_ff] float32, and 1 during a warm-up and for layers without a token so far.

    Args:
      state: after the step before.
      mechanisms: of the run.
      updates_of: by block, the preconditioned update of the gate's B (`Context.update`).
    """
    factors: dict[str, dict[str, Array]] = {}
    for label, mechanism in mechanisms.entries:
        factors[label] = {}
        for path, updates in state.updates.items():
            context = mechanisms.context(state.count, path)
            context = context._replace(update=updates_of.get(path))
            factor = mechanism.factor(state.memory[label][path], context)
            order = mechanisms.orders.get((label, path))
            factor = mechanism.permuted(factor, context, order)
            active = (state.count >= mechanism.warmup) & (updates > 0)
            factor = jnp.where(active[..., None], factor, 1)
            factors[label][path] = factor.astype(jnp.float32)
    return factors


def channel_factors(
    state: GateState,
    mechanisms: Mechanisms,
    own: Mapping[str, Mapping[str, Array]] | None = None,
) -> RuleFactors:
    """Returns the factor of each channel in the next step by place and block, [..., d_ff] float32.

    Factors that reallocate are multiplied and normalized to a root mean square of 1 over each
    layer's channels (`equalize`); then the other factors are multiplied on.

    Args:
      state: after the step before.
      mechanisms: of the run.
      own: `own_factors` of both, if already computed.
    """
    factors = own
    if factors is None:
        factors = own_factors(state, mechanisms)

    def joint(place: str, path: str) -> Array:
        """Returns the product of the factors that act at a place, for the block at ``path``."""
        acting = [
            (mechanism, factors[label][path])
            for label, mechanism in mechanisms.entries
            if place in mechanism.places
        ]
        _, first = acting[0]
        product = jnp.ones_like(first)
        for mechanism, factor in acting:
            if mechanism.reallocates:
                product = product * factor
        product = equalize(product)
        for mechanism, factor in acting:
            if not mechanism.reallocates:
                product = product * factor
        return product

    by_place: RuleFactors = {}
    for place in mechanisms.places:
        by_place[place] = {path: joint(place, path) for path in state.updates}
    return by_place


def equalize(factor: Array) -> Array:
    """Returns ``factor`` [..., d_ff] over its root mean square in each layer.

    The norm of a layer's update stays about the same, so the factor is not a hidden learning rate.
    A layer whose channels all have one factor, 0 included, gets ones.
    """
    low = jnp.min(factor, axis=-1, keepdims=True)
    high = jnp.max(factor, axis=-1, keepdims=True)
    mean_square = jnp.mean(jnp.square(factor), axis=-1, keepdims=True)
    size = jnp.sqrt(mean_square)
    divisor = jnp.where(size > 0, size, 1.0)
    return jnp.where(low == high, 1.0, factor / divisor)


# ---------------------------------------------------------------- the transform


def gate_leaves(mechanisms: Mechanisms, channels: tuple[int, ...]) -> dict[str, Any]:
    """Returns the leaves of a gate next to its A and B: zeros ``taps`` and, for masks, ones.

    Args:
      mechanisms: of the run.
      channels: ``(..., d_ff)``; leading axes are stacked layers.
    """
    leaves: dict[str, Any] = {TAPS: statistics.taps(mechanisms.statistics, channels)}
    if "gradient_a" in mechanisms.places:
        leaves[MASK] = jnp.ones(channels, jnp.float32)
    return leaves


def scale_by_gates(
    mechanisms: Mechanisms, gates: Mapping[str, str] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Returns the transform that multiplies the columns of every gate's B by the rules' factors.

    DoRA's magnitudes are multiplied as well: a column with factor 0 keeps length and direction.

    Args:
      mechanisms: the rules (`make_mechanisms`).
      gates: block of each gate, e.g. ``{"layers/ffn/gate_proj": "layers/ffn"}``
        (`nalora_jax.method.low_rank.find_gates`): the gate's B is ``<gate>/b [..., r, d_ff]``, and
        ``gate_stats`` has the statistics of the block.
        By default the nodes with ``taps`` (`gate_leaves`), each of which is its own block.

    Returns:
      A transform whose state is a `GateState` and whose ``update`` takes ``gate_stats``: sums by
      block and statistic of this step. It ignores other keyword arguments.

    Example:
      >>> optimizer = optax.chain(optax.adamw(1e-3), scale_by_gates(mechanisms, {"gate": "ffn"}))
      >>> updates, state = optimizer.update(grads, state, lora, gate_stats={"ffn": sums})
    """

    def init_fn(params: Any) -> GateState:
        """Returns the averages before the first step, for the gates among ``params``."""
        flat = _named(params)
        chosen = gates
        if chosen is None:
            chosen = _gates_of(params)
        shapes = {}
        for gate, block in chosen.items():
            if f"{gate}/b" not in flat:
                present = ", ".join(path for path in flat if path.endswith("/b"))
                found = present or "no leaf named 'b'"
                raise NaloraError(
                    "gates", expected=f"a parameter {gate}/b", found=found
                )
            *lead, _, d_ff = flat[f"{gate}/b"].shape  # [..., r, d_ff]
            shapes[block] = (*lead, d_ff)
        return init_gate_state(shapes, mechanisms)

    def update_fn(
        updates: Any,
        state: GateState,
        params: Any = None,
        *,
        gate_stats: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, GateState]:
        """Returns the updates with the gates' B scaled, and the averages after the step."""
        if gate_stats is None:
            raise NaloraError(
                "optimizer.update(..., gate_stats=)",
                expected=f"the statistics of {', '.join(state.updates)}",
                found="no argument",
            )
        chosen = gates
        if chosen is None:
            chosen = _gates_of(updates)
        flat = _named(updates)
        updates_of = {block: flat[f"{gate}/b"] for gate, block in chosen.items()}
        own = own_factors(state, mechanisms, updates_of)
        factors = channel_factors(state, mechanisms, own).get("update_b", {})
        if factors:
            updates = multiply_columns(updates, factors, chosen)
        return updates, update_gate_state(state, gate_stats, mechanisms)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def multiply_columns(
    updates: Any, factors: Mapping[str, Array], gates: Mapping[str, str]
) -> Any:
    """Returns ``updates`` with the columns of every gate's B, and DoRA's magnitudes, times factors.

    Args:
      updates: a tree with leaves ``<gate>/b [..., r, d_ff]`` and maybe ``<gate>/magnitude [...,
        d_ff]``.
      factors: by block, [..., d_ff].
      gates: block of each gate.
    """
    of_leaf = {
        f"{gate}/b": factors[block][..., None, :] for gate, block in gates.items()
    }
    of_leaf |= {f"{gate}/magnitude": factors[block] for gate, block in gates.items()}

    def scale(path: str, update: Array) -> Array:
        if path in of_leaf:
            return update * of_leaf[path].astype(update.dtype)
        return update

    return _map_named(scale, updates)


def nalora(
    inner: optax.GradientTransformation,
    mechanisms: Mechanisms,
    gates: Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns ``inner`` with the rules' factors on the gates' B.

    Args:
      inner: any optax optimizer.
      mechanisms: the rules of the run. Without a rule the updates are bit-identical to those of
        ``inner``.
      gates: as in `scale_by_gates`, for adapters without gate leaves; ``update`` then takes
        ``gate_stats``. By default adapters have gate leaves (`gate_leaves`): ``inner`` does not see
        them, the gradient of ``taps`` is the statistics, and ``mask`` is set to the mask of the
        next step, as Flax's ``_overwrite_with_gradient`` sets the scales of float8 matmuls.

    Example:
      >>> adapted, mechanisms = adapt(model, ...)
      >>> optimizer = nalora(optax.adamw(1e-3), mechanisms)
      >>> updates, state = optimizer.update(grads, state, lora)
    """
    scale = scale_by_gates(mechanisms, gates)
    if gates is not None:
        if not mechanisms.entries or not gates:
            return optax.with_extra_args_support(inner)
        return optax.with_extra_args_support(optax.chain(inner, scale))
    seen = lambda tree: _map_named(lambda path, _: not _is_gate_leaf(path), tree)  # noqa: E731
    adapters = optax.with_extra_args_support(optax.masked(inner, seen))

    def init_fn(params: Any) -> tuple[Any, GateState]:
        """Returns the state of ``inner`` and the averages before the first step."""
        if mechanisms.entries and not _gates_of(params):
            found = ", ".join(_named(params)) or "nothing"
            raise NaloraError(
                "optimizer.init",
                expected="adapters with taps below the name of a gate, from adapt or gate_leaves",
                found=found,
            )
        return adapters.init(params), scale.init(params)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        """Returns the updates, those of taps and masks included, and the next state."""
        if params is None:
            raise NaloraError(
                "optimizer.update(..., params)", expected="the adapters", found=None
            )
        inner_state, averages = state
        flat = _named(updates)
        # The gradient of the tap "<gate>/taps/slope" is the statistic "<gate>/slope".
        stats = {
            path.replace(f"/{TAPS}/", "/"): x
            for path, x in flat.items()
            if f"/{TAPS}/" in path
        }
        updates, inner_state = adapters.update(
            updates, inner_state, params, **extra_args
        )
        updates, averages = scale.update(updates, averages, params, gate_stats=stats)
        weights = channel_factors(averages, mechanisms).get("gradient_a", {})

        def set_leaf(path: str, update: Array, param: Array) -> Array:
            """Returns the update of a leaf: for a mask the one that sets the next step's mask, for
            taps zeros."""
            gate, _, name = path.rpartition("/")
            if not _is_gate_leaf(path):
                return update
            if name == MASK:
                return weights[gate] - param
            return jnp.zeros_like(update)

        return _map_named(set_leaf, updates, params), (inner_state, averages)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def gate_state(opt_state: Any) -> GateState | None:
    """Returns the averages in the state of an optimizer with `scale_by_gates`; None without one."""
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_state)
    return next(filter(_is_state, nodes), None)


def replace_gate_state(opt_state: Any, state: GateState | None) -> Any:
    """Returns the state of an optimizer with other averages."""

    def with_state(node: Any) -> Any:
        if _is_state(node):
            return state
        return node

    return jax.tree.map(with_state, opt_state, is_leaf=_is_state)


def _is_state(node: Any) -> bool:
    return isinstance(node, GateState)


def masks(opt_state: Any, mechanisms: Mechanisms) -> dict[str, Array]:
    """Returns the masks of the next step's gradient of A by block, [..., d_ff]; {} without."""
    state = gate_state(opt_state)
    if state is None:
        return {}
    return channel_factors(state, mechanisms).get("gradient_a", {})


def _gates_of(tree: Any) -> dict[str, str]:
    """Returns the nodes of a tree that have taps, as gates that are their own blocks."""
    taps = [path for path in _named(tree) if f"/{TAPS}/" in path]
    nodes = {path.partition(f"/{TAPS}/")[0] for path in taps}
    return {node: node for node in sorted(nodes)}


def _is_gate_leaf(path: str) -> bool:
    """Returns True if the leaf at ``path`` is a tap or a mask of a gate."""
    return f"/{TAPS}/" in path or path.endswith(f"/{MASK}")


# Paths of an `nnx.Variable` end in the attribute that holds its array, which is left out.
_VALUE = "/value"


def _named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path."""
    return {
        path.removesuffix(_VALUE): leaf for path, leaf in trees.flatten(tree).items()
    }


def _map_named(function: Callable[..., Any], *given: Any) -> Any:
    """Returns a tree of ``function(path, *leaves)`` for the leaves of the given trees."""
    return trees.map_named(
        lambda path, *leaves: function(path.removesuffix(_VALUE), *leaves), *given
    )
