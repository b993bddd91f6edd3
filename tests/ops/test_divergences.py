"""Divergences against TRL's in float64, and in chunks against the plain formula."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.divergences import (
    TeacherLogits,
    divergence,
    token_divergences,
)
from nalora_jax.ops.losses import Head

TRL = json.loads(Path(__file__).with_name("trl_distillation.json").read_text())


def name_of(case: dict) -> str:
    return "beta {beta} at {temperature}".format(**case["settings"])


@pytest.mark.parametrize("case", TRL["cases"], ids=name_of)
def test_divergence_and_gradient_are_those_of_trl(case):
    settings = case["settings"]
    with jax.enable_x64(True):
        student, teacher = (jnp.array(case[name], float) for name in ("student", "teacher"))
        log_p, log_q = (jax.nn.log_softmax(x / settings["temperature"]) for x in (student, teacher))
        real = np.array(case["labels"]) != -100
        results = divergence(log_p, log_q, settings["beta"])
        values, slope = map(np.asarray, results)
    loss = values[real].sum() / real.sum()
    gradient = slope * real[..., None] / real.sum() / settings["temperature"]
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-12)
    np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-10, atol=1e-15)


def plain(hidden, kernel, head, teacher, weights, beta):
    """Returns the summed divergence by its formula, differentiable by ``hidden``."""

    def logits(hidden, kernel, head):
        products = hidden @ (kernel.T if head.transposed else kernel) * head.scale
        if head.softcap:
            products = head.softcap * jnp.tanh(products / head.softcap)
        return products

    of_student = logits(hidden, kernel, head)
    of_teacher = logits(teacher.hidden, teacher.kernel, teacher.head)
    common = min(of_student.shape[-1], of_teacher.shape[-1])
    p, q = (jax.nn.log_softmax(x[..., :common]) for x in (of_student, of_teacher))
    if beta == 0:
        values = jnp.exp(q) * (q - p)
    elif beta == 1:
        values = jnp.exp(p) * (p - q)
    else:
        m = jnp.log((1 - beta) * jnp.exp(p) + beta * jnp.exp(q))
        values = beta * jnp.exp(q) * (q - m) + (1 - beta) * jnp.exp(p) * (p - m)
    return jnp.sum(weights * values.sum(-1))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("compact", "shards", "chunk"), [(True, 1, 4), (False, 1, 3), (False, 2, 2), (True, 1, 0)]
)
@pytest.mark.parametrize("of_teacher", ["larger table", "smaller table"])
def test_chunks_have_value_and_gradient_of_the_whole(beta, compact, shards, chunk, of_teacher):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)  # noqa: E731
    hidden, kernel = draw(2, 7, 5), draw(11, 5)
    head = Head(transposed=True, softcap=3.0, scale=0.7)
    weights = jnp.array(rng.integers(0, 2, (2, 7)) * rng.uniform(0.5, 2, (2, 7)), jnp.float32)
    vocab = 13 if of_teacher == "larger table" else 9
    teacher = TeacherLogits(draw(2, 7, 6), draw(6, vocab), Head(scale=1.5))
    products = teacher.hidden @ teacher.kernel
    best = jnp.argmax(products[..., :11], axis=-1)
    value, gradient = jax.value_and_grad(plain)(hidden, kernel, head, teacher, weights, beta)
    measure = partial(
        token_divergences, beta=beta, head=head, numerics=Numerics(),
        chunk=chunk, compact=compact, shards=shards,
    )  # fmt: skip
    found = jax.jit(lambda hidden: measure(hidden, kernel, teacher, weights))(hidden)
    np.testing.assert_allclose(found.losses.sum(), value, rtol=1e-5)
    np.testing.assert_allclose(found.gradient, gradient, rtol=1e-4, atol=1e-6)
    common = 9 if of_teacher == "smaller table" else 11
    agrees = jnp.argmax((hidden @ kernel.T)[..., :common], axis=-1) == best
    np.testing.assert_allclose(found.agreements, weights * agrees)
    without = partial(measure, grad=False)(hidden, kernel, teacher, weights)
    np.testing.assert_allclose(without.losses, found.losses, rtol=1e-5)
    assert without.gradient.shape == (2, 7, 0)


def test_no_array_has_all_logits():
    """Neither model's logits of all tokens exist in the compiled program."""
    tokens, vocab, width = 512, 1024, 8

    def measure(hidden, kernel, of_teacher, other, weights):
        teacher = TeacherLogits(of_teacher, other, Head())
        options = {"beta": 0.5, "head": Head(), "numerics": Numerics(), "chunk": 32}
        return token_divergences(hidden, kernel, teacher, weights, **options)

    shapes = [(1, tokens, width), (width, vocab), (1, tokens, width), (width, vocab), (1, tokens)]
    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    compiled = jax.jit(measure).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * tokens * vocab / 2


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_divergences_of_certain_models_are_finite(beta):
    logits = jnp.array([[200.0, 0.0, -200.0], [-200.0, 0.0, 200.0]])
    log_p = jax.nn.log_softmax(logits)
    for values in divergence(log_p, log_p[::-1], beta):
        assert np.isfinite(values).all()
