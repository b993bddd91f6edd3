"""AdaLoRA on experts, on a mesh and in files; its steps are those of PEFT in tests/train/test_peft_training.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nalora_jax.common import trees
from nalora_jax.config import AdaLoRAConfig, LoRAConfig, LoRARule, RunConfig, check
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import adapter_spec, init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.train.adalora import adalora
from nalora_jax.weights.adapter_forms import remaining_ranks
from tests import tiny
from tests.param_trees import init_params

DENSE, EXPERTS = "layers/ffn/gate_proj", "layers/ffn/up_proj"
# Layers of other ranks, one without an adapter, and a projection of two experts.
SPEC = AdapterSpec(
    ((DENSE, TargetSpec((4, 2, 0), (8.0, 8.0, 1.0))), (EXPERTS, TargetSpec((3, 3, 3), (6.0, 6.0, 6.0)))),
    adalora=True,
)
SHAPES = {DENSE: (3, 5, 4, 6), EXPERTS: (3, 2, 5, 3, 6)}


def random_tree(seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Adapters of `SPEC` without padding's zeros being anything else, and a table that is trained beside them."""
    rng, leaves = np.random.default_rng(seed), {}
    for path, target in SPEC.targets:
        *lead, d_in, rank, d_out = SHAPES[path]
        used = np.arange(rank) < np.array(target.ranks)[:, None]
        used = np.broadcast_to(used.reshape(len(used), *[1] * (len(lead) - 1), rank), (*lead, rank))
        leaves[f"{path}/a"] = rng.normal(size=(*lead, d_in, rank)) * used[..., None, :]
        leaves[f"{path}/b"] = rng.normal(size=(*lead, rank, d_out)) * used[..., None]
        leaves[f"{path}/singular"] = rng.normal(size=(*lead, rank)) * used
    leaves["embed/embedding"] = rng.normal(size=(7, 5))
    return trees.unflatten({path: (scale * leaf).astype(np.float32) for path, leaf in leaves.items()})


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_left_is_a_plain_adapter_of_fewer_ranks(rslora: bool) -> None:
    lora = random_tree(3)
    for path, keep in ((DENSE, [1, 3]), (EXPERTS, [2])):
        gone = [r for r in range(SHAPES[path][-2]) if r not in keep]
        tree = lora["layers"]["ffn"][path.rpartition("/")[2]]
        tree["singular"][..., gone] = 0
    lora["layers"]["ffn"]["up_proj"]["singular"][1] = 0
    spec = AdapterSpec(SPEC.targets, rslora=rslora, adalora=True, saved=("embed_tokens",))
    left, plain = remaining_ranks(lora, spec)
    assert dict(plain.targets)[DENSE].ranks == (2, 1, 0)
    assert dict(plain.targets)[EXPERTS].ranks == (1, 0, 1)
    assert (plain.adalora, plain.saved, plain.rslora) == (False, ("embed_tokens",), rslora)
    before, after = trees.flatten(lora), trees.flatten(left)
    np.testing.assert_array_equal(after["embed/embedding"], before["embed/embedding"])
    assert not any(path.endswith("/singular") for path in after)
    for path, _ in SPEC.targets:
        a, b, e = (before[f"{path}/{name}"].astype(np.float64) for name in ("a", "b", "singular"))
        was = np.einsum("l,l...dr,l...r,l...ro->l...do", spec.scales(path), a, e, b)
        a, b = (after[f"{path}/{name}"] for name in "ab")
        now = np.einsum("l,l...dr,l...ro->l...do", plain.scales(path), a, b)
        np.testing.assert_allclose(now, was, atol=1e-5)
        assert after[f"{path}/a"].shape[-1] == max(dict(plain.targets)[path].ranks)


def test_experts_compute_with_the_diagonal() -> None:
    """A diagonal that is not one, on every projection, equals its product with A."""
    more = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    base = ModelConfig.from_hf(tiny.HF | more)
    config = RunConfig(lora=LoRAConfig(rules=(LoRARule("_proj", 3),)), adalora=AdaLoRAConfig(target_rank=1))
    spec, params = adapter_spec(config, base), init_params(base, jax.random.key(0))
    fresh, tokens = init_lora(base, spec, jax.random.key(1)), jnp.arange(10).reshape(2, 5)
    rng = np.random.default_rng(0)
    moved = {path: 10 * leaf for path, leaf in trees.flatten(fresh).items()}
    for path in (path for path in moved if path.endswith("/singular")):
        moved[path] = jnp.asarray(rng.normal(size=moved[path].shape), jnp.float32)
    plain = {path: leaf for path, leaf in moved.items() if not path.endswith("/singular")}
    for path in (path for path in plain if path.endswith("/a")):
        plain[path] = plain[path] * moved[path[:-1] + "singular"][..., None, :]
    apply = jax.jit(lambda lora: Decoder(base, spec).apply({"params": params, "lora": lora}, tokens))
    without = jax.jit(lambda: Decoder(base).apply({"params": params}, tokens))()
    np.testing.assert_allclose(apply(fresh), without, atol=1e-6)
    found = apply(trees.unflatten(moved))
    np.testing.assert_allclose(found, apply(trees.unflatten(plain)), atol=1e-5)
    assert np.abs(found - without).max() > 0.01


def test_what_does_not_go_together_is_refused_by_name() -> None:
    three, late = LoRAConfig(rules=(LoRARule("ffn", 3),)), {"warmup_share": 0.5, "final_share": 0.5}
    for lora, adalora_config, where in (
        (three, AdaLoRAConfig(target_rank=3), "--adalora.target-rank"),
        (LoRAConfig(init="pissa"), AdaLoRAConfig(target_rank=2), "--lora.init"),
        (LoRAConfig(dora=True), AdaLoRAConfig(target_rank=2), "--lora.dora"),
        (LoRAConfig(), AdaLoRAConfig(target_rank=2, **late), "--adalora.warmup-share"),
    ):
        with pytest.raises(NaloraError, match=where):
            check(RunConfig(lora=lora, adalora=adalora_config))
    few = AdapterSpec(((DENSE, TargetSpec((4, 2, 0), (8.0, 8.0, 1.0))),), adalora=True)
    optimizer = adalora(optax.with_extra_args_support(optax.sgd(1.0)), AdaLoRAConfig(target_rank=3), few, 9)
    message = r"--adalora.target-rank.*less than the mean rank.*\(3\).*found 3"
    with pytest.raises(NaloraError, match=message):
        optimizer.init(random_tree(0))
