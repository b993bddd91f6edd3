"""AdaLoRA on experts and what is left of it; its steps are those of PEFT in
tests/train/test_peft_training.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nalora_jax.assembly.adalora import adalora
from nalora_jax.common import trees
from nalora_jax.config import AdaLoRAConfig, LoRAConfig, LoRARule, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.record import check_run_config
from nalora_jax.models.adapters import adapter_spec, init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.weights.adapter_forms import remaining_ranks
from tests import tiny
from tests.param_trees import init_params

MIXTRAL = tiny.HF | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
BASE = ModelConfig.from_hf(MIXTRAL)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_left_is_a_plain_adapter_of_fewer_ranks_that_computes_the_same(
    rslora: bool,
) -> None:
    """On experts, in layers of other ranks, and beside a table that is trained."""
    rules = LoRARule("layers/1/ffn", 2), LoRARule("layers/0/attn/q_proj", 0), LoRARule("_proj", 3)
    lora_config = LoRAConfig(rules=rules, rslora=rslora, modules_to_save=("embed_tokens",))
    spec = adapter_spec(RunConfig(lora=lora_config, adalora=AdaLoRAConfig(target_rank=1)), BASE)
    params, rng = init_params(BASE, jax.random.key(0)), np.random.default_rng(0)
    fresh = init_lora(BASE, spec, jax.random.key(1), params)
    lora, kept = {path: 10 * np.asarray(leaf) for path, leaf in trees.flatten(fresh).items()}, {}
    for path, target in spec.targets:
        shape = lora[f"{path}/singular"].shape
        remains = target.used(shape) & (rng.random(shape) < 0.5)  # of each expert others
        lora[f"{path}/singular"] = np.float32(rng.normal(size=shape) * remains)
        kept[path] = tuple(remains.reshape(shape[0], -1, shape[-1]).sum(-1).max(1))
    left, plain = remaining_ranks(trees.unflatten(lora), spec)
    assert (plain.adalora, plain.saved, plain.rslora) == (False, spec.saved, rslora)
    assert {path: target.ranks for path, target in plain.targets} == {
        path: ranks for path, ranks in kept.items() if any(ranks)
    }
    tokens = jnp.arange(10).reshape(2, 5)
    before, after, start = (
        tiny.logits_of(Decoder(BASE, of), {"params": params, "lora": leaves}, tokens)
        for of, leaves in ((spec, trees.unflatten(lora)), (plain, left), (spec, fresh))
    )
    np.testing.assert_allclose(after, before, atol=1e-4)
    assert np.abs(before - start).max() > 0.01


def test_what_does_not_go_together_is_refused_by_name() -> None:
    three, late = LoRAConfig(rules=(LoRARule("ffn", 3),)), {"warmup_share": 0.5, "final_share": 0.5}
    for lora, adalora_config, where in (
        (three, AdaLoRAConfig(target_rank=3), "--adalora.target-rank"),
        (LoRAConfig(init="pissa"), AdaLoRAConfig(target_rank=2), "--lora.init"),
        (LoRAConfig(dora=True), AdaLoRAConfig(target_rank=2), "--lora.dora"),
        (LoRAConfig(), AdaLoRAConfig(target_rank=2, **late), "--adalora.warmup-share"),
    ):
        with pytest.raises(NaloraError, match=where):
            check_run_config(RunConfig(lora=lora, adalora=adalora_config))
    rules = LoRARule("layers/0/ffn", 2), LoRARule("ffn", 4)
    config = RunConfig(lora=LoRAConfig(rules=rules), adalora=AdaLoRAConfig(target_rank=3))
    spec = adapter_spec(config, BASE)
    optimizer = adalora(optax.with_extra_args_support(optax.sgd(1.0)), config.adalora, spec, 9)
    with pytest.raises(
        NaloraError, match=r"--adalora.target-rank.*less than the mean rank.*\(3\).*found 3"
    ):
        optimizer.init(init_lora(BASE, spec, jax.random.key(1)))
