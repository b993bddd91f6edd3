"""AdaLoRA as an optax transform: adapters ``s (x A) diag(e) B`` with ranks pruned by importance.

All adapters start with the ranks of their rules and with ``e = 0``. A component of an adapter is
an entry of ``e``, its column of A and its row of B. The importance of a component is the smoothed
sensitivity of its weights times the uncertainty of that sensitivity::

    I(w)     = |w dL/dw|
    score(w) = ema(I)(w) * ema(|I - ema(I)|)(w)
    score    = score(e_i) + mean of score(A[:, i]) + mean of score(B[i, :])

After the warm-up, every ``interval`` steps, the components with the lowest scores over all adapters
have their ``e`` set to 0, until a budget of components remains. The budget falls from all
components to ``target_rank`` an adapter, as the third power of the steps that are left. A pruned
component is still trained and can return at the next allocation. The last allocation,
``final_share`` of the steps before the end, is final. A penalty keeps A's columns and B's rows
orthonormal, so that components do not share directions; only its gradient is added, and logs show
the loss without it.

Source: AdaLoRA, arXiv 2303.10512; schedule and scores are equal to PEFT's ``AdaLoraModel``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nalora_jax.common import trees
from nalora_jax.config import AdaLoRAConfig
from nalora_jax.errors import NaloraError
from nalora_jax.models.targets import AdapterSpec

_NAMES = ("a", "b", "singular")


class RankState(NamedTuple):
    """State of the rank allocation, with the state of the wrapped optimizer."""

    inner: Any
    step: jax.Array  # int32 []
    sensitivity: dict[str, Any]  # EMA for every weight of the adapters
    uncertainty: dict[str, Any]  # EMA for every weight of the adapters
    # bool for every entry of `singular`: kept by the last allocation
    kept: dict[str, Any]


def adalora(
    inner: optax.GradientTransformationExtraArgs,
    config: AdaLoRAConfig,
    spec: AdapterSpec,
    total_steps: int,
    *,
    clip_norm: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Wraps ``inner``: trains on the penalised loss and allocates ranks after each of its steps.

    Args:
      inner: computes the update, learning rate included.
      config: schedule and budget of the allocation.
      spec: the adapters, ``adalora`` among their attributes.
      total_steps: steps of the run.
      clip_norm: gradient norm at which ``inner`` clips; the sensitivity uses the clipped gradient.
        0: no clipping.

    Returns:
      A transform of adapters with ``a``, ``b`` and ``singular``
      (`nalora_jax.models.adapters.init_lora`). It passes all other trained leaves through.

    Raises:
      NaloraError: the initial ranks do not exceed the ranks to keep.
    """
    if clip_norm > 0:
        clip = optax.clip_by_global_norm(clip_norm)
    else:
        clip = optax.identity()

    def init(params: Any) -> RankState:
        """Returns the state with all components kept; raises an error if no rank can be taken."""
        leaves = _adapters(params, spec)
        _budgets(config, spec, leaves)
        zeros = trees.unflatten(
            {path: jnp.zeros_like(leaf) for path, leaf in leaves.items()}
        )
        singular = {f"{path}/singular": target for path, target in spec.targets}
        used = {
            name: jnp.asarray(target.used(leaves[name].shape))
            for name, target in singular.items()
        }
        # Distinct buffers: the step donates the state, and a buffer can be donated once.
        still = jax.tree.map(jnp.copy, zeros)
        return RankState(
            inner.init(params),
            jnp.zeros([], jnp.int32),
            zeros,
            still,
            trees.unflatten(used),
        )

    def update(
        grads: Any, state: RankState, params: Any = None, **extra: Any
    ) -> tuple[Any, RankState]:
        """Returns updates that set pruned entries of ``singular`` to 0, and the next state."""
        step = state.step + 1
        grads = _penalised(grads, params, config.orthogonality, spec)
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        # `inner` clips internally; the sensitivity needs the clipped gradient itself.
        clipped, _ = clip.update(grads, clip.init(params))
        new = _adapters(optax.apply_updates(params, updates), spec)
        moments = _smoothed(
            state, new, _adapters(clipped, spec), step, config, total_steps
        )
        used, acts = _allocated(state, moments, step, config, spec, total_steps)
        flat = trees.flatten(updates)
        now = trees.flatten(params)
        for path, keep in used.items():
            # The update that makes the entry exactly 0.
            flat[path] = jnp.where(acts & ~keep, -now[path], flat[path])
        sensitivity, uncertainty = map(trees.unflatten, moments)
        return trees.unflatten(flat), RankState(
            inner_state, step, sensitivity, uncertainty, trees.unflatten(used)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _adapters(tree: Any, spec: AdapterSpec) -> dict[str, jax.Array]:
    """Returns the leaves of the adapters by path."""
    leaves = trees.flatten(tree)
    return {
        f"{path}/{name}": leaves[f"{path}/{name}"]
        for path, _ in spec.targets
        for name in _NAMES
    }


def _budgets(
    config: AdaLoRAConfig, spec: AdapterSpec, leaves: dict[str, Any]
) -> tuple[int, int]:
    """Returns the number of components at the start and at the end of the allocation.

    ``leaves`` are the adapters by path, or values with their shapes.

    Raises:
      NaloraError: no component would be pruned.
    """
    first = last = 0
    for path, target in spec.targets:
        used = target.used(leaves[f"{path}/singular"].shape)
        first += int(used.sum())
        last += config.target_rank * int(used.any(-1).sum())
    if last >= first:
        mean_rank = first * config.target_rank / last
        raise NaloraError(
            "--adalora.target-rank",
            expected=f"less than the mean rank that the adapters begin with ({mean_rank:g})",
            found=config.target_rank,
            remedy="raise the ranks in --lora.rules: AdaLoRA takes ranks away",
        )
    return first, last


def _penalised(grads: Any, params: Any, weight: float, spec: AdapterSpec) -> Any:
    """Adds the gradient of the penalty, see `_distance`, to ``grads``."""
    if not weight:
        return grads
    penalty = jax.grad(lambda leaves: weight * _distance(leaves, spec))(
        _adapters(params, spec)
    )
    return trees.unflatten(
        {path: g + penalty.get(path, 0.0) for path, g in trees.flatten(grads).items()}
    )


def _distance(leaves: dict[str, jax.Array], spec: AdapterSpec) -> jax.Array:
    """Returns the mean Frobenius distance of ``A^T A`` and ``B B^T`` from the identity, ``[]``.

    The mean is over the A and B of all layers with an adapter; beyond a layer's rank the identity
    is 0.
    """
    total = jnp.zeros([])
    count = 0
    for path, target in spec.targets:
        used = target.used(leaves[f"{path}/singular"].shape)
        identity = used[..., None] * np.eye(used.shape[-1], dtype=np.float32)
        # [layers, ..., d_in, rank] and [layers, ..., rank, d_out] -> [layers, ..., rank, rank]
        for name, product in (("a", "...dr,...ds->...rs"), ("b", "...rd,...sd->...rs")):
            factor = leaves[f"{path}/{name}"]
            gram = jnp.einsum(product, factor, factor, precision="highest")
            # The small term makes the root differentiable at 0.
            norms = jnp.sqrt(jnp.sum((gram - identity) ** 2, axis=(-2, -1)) + 1e-30)
            total += jnp.sum(jnp.where(used.any(-1), norms, 0.0))
            count += int(used.any(-1).sum())
    return total / count


def _smoothed(
    state: RankState,
    params: dict[str, jax.Array],
    grads: dict[str, jax.Array],
    step: jax.Array,
    config: AdaLoRAConfig,
    total_steps: int,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the EMAs of sensitivity and uncertainty after a step, by path of the weight.

    The sensitivity is the product of the weights after the step and the gradient before it, as in
    PEFT. Both EMAs are fixed from the last allocation on.
    """
    sensitivity = trees.flatten(state.sensitivity)
    uncertainty = trees.flatten(state.uncertainty)
    _, last_allocation = config.steps(total_steps)
    is_measured = step < last_allocation
    beta1 = config.sensitivity_decay
    beta2 = config.uncertainty_decay
    for path, leaf in params.items():
        of_step = jnp.abs(leaf * grads[path])
        new_sensitivity = beta1 * sensitivity[path] + (1 - beta1) * of_step
        deviation = jnp.abs(of_step - new_sensitivity)
        new_uncertainty = beta2 * uncertainty[path] + (1 - beta2) * deviation
        sensitivity[path] = jnp.where(is_measured, new_sensitivity, sensitivity[path])
        uncertainty[path] = jnp.where(is_measured, new_uncertainty, uncertainty[path])
    return sensitivity, uncertainty


def _allocated(
    state: RankState,
    moments: tuple[dict[str, jax.Array], dict[str, jax.Array]],
    step: jax.Array,
    config: AdaLoRAConfig,
    spec: AdapterSpec,
    total_steps: int,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns the kept components after a step, and True if the step zeroes the others.

    Args:
      state: the state before the step.
      moments: EMAs of sensitivity and uncertainty, by path of the weight.
      step: number of the step, counted from 1.
      config, spec, total_steps: see `adalora`.

    Returns:
      By path of ``singular``, bool with its shape ``[layers, ..., rank]``; and bool ``[]``.
    """
    # The score of each weight.
    element = {path: moments[0][path] * moments[1][path] for path in moments[0]}
    scores = {}
    for path, target in spec.targets:
        score = (
            element[f"{path}/singular"]
            + element[f"{path}/a"].mean(-2)
            + element[f"{path}/b"].mean(-1)
        )
        # [layers, ..., rank]; entries beyond a layer's rank never count as the lowest.
        scores[f"{path}/singular"] = jnp.where(target.used(score.shape), score, jnp.inf)
    first, last = _budgets(config, spec, element)
    begin, end = config.steps(total_steps)
    # Share of the allocation phase that is left: 1 during the warm-up, 0 at its end.
    left = jnp.clip((end - step) / max(end - begin, 1), 0.0, 1.0)
    budget = jnp.floor((first - last) * left**3 + last).astype(jnp.int32)
    ranking = jnp.sort(
        jnp.concatenate([score.reshape(-1) for score in scores.values()])
    )
    # The largest score among the `first - budget` lowest; only higher scores are kept.
    threshold = jnp.where(
        budget < first, ranking[jnp.maximum(first - budget - 1, 0)], -jnp.inf
    )
    due = ((step > begin) & (step < end) & (step % config.interval == 0)) | (
        step == end
    )
    before = trees.flatten(state.kept)
    used = {}
    for path, score in scores.items():
        chosen = (score > threshold) & jnp.isfinite(score)
        used[path] = jnp.where(due, chosen, before[path])
    return used, due | (step > end)
