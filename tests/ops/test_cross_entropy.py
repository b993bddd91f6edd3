"""The chunked cross-entropy against the plain one in float64, value and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.ops.dispatch import Platform, numerics_for
from nalora_jax.ops.losses import Head, cross_entropy
from nalora_jax.ops.storage import prepare


def _problem(
    seed: int = 0, batch: int = 3, seq: int = 7, vocab: int = 33, d: int = 8
) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 2, (batch, seq)) * rng.uniform(0.5, 2.0, (batch, seq))
    hidden, kernel = rng.normal(size=(batch, seq, d)), rng.normal(size=(d, vocab))
    return hidden, kernel, rng.integers(0, vocab, (batch, seq)), weights


def _reference(
    hidden: np.ndarray, kernel: np.ndarray, targets: np.ndarray, weights: np.ndarray, head: Head
) -> tuple[float, np.ndarray]:
    logits = hidden @ kernel * head.scale
    slope = np.full_like(logits, head.scale)
    if head.softcap:
        logits = head.softcap * np.tanh(logits / head.softcap)
        slope = head.scale * (1 - (logits / head.softcap) ** 2)
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp -= logits.max(-1, keepdims=True)
    onehot = np.eye(kernel.shape[1])[targets]
    loss = -(weights * (logp * onehot).sum(-1)).sum()
    return loss, ((np.exp(logp) - onehot) * slope * weights[..., None]) @ kernel.T


SMALL: dict[str, int] = {}
LARGE = {"seed": 1, "batch": 6, "seq": 130, "vocab": 5000}


@pytest.mark.parametrize(
    ("sizes", "targeted", "head", "options"),
    [
        (SMALL, 1.0, Head(False), {"compact": False, "chunk": 4}),
        (SMALL, 1.0, Head(False, 5.0, 0.5), {"compact": True, "chunk": 5}),
        (SMALL, 1.0, Head(True, 5.0, 0.5), {"compact": False, "chunk": 5}),
        (SMALL, 1.0, Head(True), {"compact": True, "chunk": 0}),
        (LARGE, 0.02, Head(False, 4.0), {}),
        (LARGE, 1.0, Head(True, 4.0), {}),
    ],
)
def test_value_and_gradient(sizes, targeted, head, options, numerics):
    """A head that is prepared is the head."""
    hidden, kernel, targets, weights = _problem(**sizes)
    weights = weights * (np.random.default_rng(2).uniform(size=weights.shape) < targeted)
    part, name = ("embed", "embedding") if head.transposed else ("lm_head", "kernel")
    want, want_gradient = _reference(hidden, kernel, targets, weights, head)
    hidden, weights = jnp.asarray(hidden, jnp.float32), jnp.asarray(weights, jnp.float32)
    for dtype, near in (("float32", 1e-5), ("bfloat16", 0.02)):
        table = jnp.asarray(kernel.T if head.transposed else kernel, dtype)
        prepared = prepare({"params": {part: {name: table}}}, numerics(dtype))["params"][part][name]

        def loss(h, table, dtype=dtype):
            return cross_entropy(
                h, table, jnp.asarray(targets), weights, head, numerics(dtype), **options
            )

        run = jax.jit(jax.value_and_grad(lambda h, table, loss=loss: 3.0 * loss(h, table)))
        results = [run(hidden, of) for of in (table, prepared)]
        jax.tree.map(np.testing.assert_array_equal, *results)
        np.testing.assert_allclose(results[0][0], 3 * want, rtol=near)
        limit = near * np.abs(want_gradient).max()
        np.testing.assert_allclose(results[0][1] / 3, want_gradient, atol=limit)
        np.testing.assert_allclose(jax.jit(loss)(hidden, table), want, rtol=near)


@pytest.mark.parametrize(("size", "targeted"), [(1.0, 0), (1e4, 1)])
def test_no_targets_and_extreme_logits_are_finite(size, targeted):
    hidden, kernel, targets, weights = _problem()
    given = (jnp.asarray(x, jnp.float32) for x in (size * hidden, kernel, targeted * weights))
    hidden, kernel, weights = given
    value, gradient = jax.value_and_grad(cross_entropy)(
        hidden, kernel, jnp.asarray(targets), weights
    )
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert bool(np.any(gradient)) == (value != 0) == (targeted > 0)


@pytest.mark.parametrize(("compact", "transposed"), [(True, True), (True, False), (False, False)])
def test_a_bf16_head_is_never_widened_or_copied_as_a_whole(compact, transposed):
    tokens, vocab, d = 64, 65536, 64
    shapes = [
        ((4, tokens // 4, d), "float32"),
        ((vocab, d) if transposed else (d, vocab), "bfloat16"),
    ]
    hidden, kernel = (jax.ShapeDtypeStruct(*s) for s in shapes)
    targets, weights = (
        jax.ShapeDtypeStruct((4, tokens // 4), dtype) for dtype in ("int32", "float32")
    )
    half, head = (
        numerics_for("bfloat16", Platform("cpu", "", 8)),
        Head(transposed),
    )  # no kernel is native
    if compact:  # as the step has it: prepared on one device, bf16 on a mesh
        kernel = prepare({"params": {"lm_head": {"kernel": kernel}}}, half)["params"]["lm_head"][
            "kernel"
        ]
    step = jax.grad(
        lambda h, k, t, w: cross_entropy(h, k, t, w, head, half, chunk=4, compact=compact)
    )
    analysis = jax.jit(step).lower(hidden, kernel, targets, weights).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 0.8 * vocab * d * 2


@pytest.mark.parametrize("transposed", [True, False])
def test_whole_rows_of_logits_take_no_entries_of_the_head(transposed):
    # A TPU or GPU would make a transposed copy of an untied head for it, and one that is split
    # would be gathered.
    hidden, kernel, targets, weights = _problem()
    table = jnp.asarray(kernel.T if transposed else kernel, jnp.float32)
    arguments = (jnp.asarray(targets), jnp.asarray(weights, jnp.float32))
    step = jax.grad(
        lambda h: cross_entropy(h, table, *arguments, head=Head(transposed), compact=False)
    )
    assert "gather" not in str(jax.make_jaxpr(step)(jnp.asarray(hidden, jnp.float32)))
