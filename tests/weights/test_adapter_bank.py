"""Several adapters on one base: each example of a stacked batch equals its own run, without another trace."""

from __future__ import annotations

from functools import cache
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax import trees
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import AdapterSpec, resolve
from nalora_jax.weights.adapter_bank import AdapterBank, combine_adapters
from tests.param_trees import init_params

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 40,
        "hidden_act": "silu",
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
)
TOKENS = np.random.default_rng(1).integers(0, 50, (3, 9)).astype(np.int32)


@cache
def base() -> Any:
    with jax.ensure_compile_time_eval():  # also where a program is traced
        return init_params(CONFIG, jax.random.key(0))


def _adapter(seed: int, *rules: LoRARule, **variant: Any) -> tuple[dict, AdapterSpec]:
    spec = resolve(LoRAConfig(rules=rules, **variant), projection_shapes(CONFIG), CONFIG.n_layers)
    rng = np.random.default_rng(seed)

    def fresh() -> Any:
        return init_lora(CONFIG, spec, jax.random.key(0), init_params(CONFIG, jax.random.key(0)))

    # The file's imports compile nothing: every process of the suite executes them.
    shapes = jax.eval_shape(fresh)
    used = trees.map_named(lambda path, x: np.float32(rng.normal(size=x.shape) * 0.3), shapes)
    if any(len(set(target.ranks)) > 1 for _, target in spec.targets):
        raise AssertionError("ranks of this helper do not differ by layer")
    return used, spec


LEGAL = _adapter(1, LoRARule("gate_proj", 4, 12.0), LoRARule("q_proj", 2, 2.0))
CHAT = _adapter(2, LoRARule("ffn", 3, 3.0), rslora=True)


def _logits(lora: Any, spec: AdapterSpec, tokens: Any, **options: Any) -> jax.Array:
    model = Decoder(CONFIG, spec)
    variables = {"params": base()} | ({} if lora is None else {"lora": lora})
    return model.apply(variables, model.apply(variables, tokens, **options), method="unembed")


def _alone(lora: Any, spec: AdapterSpec) -> jax.Array:
    return jax.jit(lambda lora: _logits(lora, spec, TOKENS))(lora)


def test_every_example_gets_its_own_adapter_in_one_program() -> None:
    bank = AdapterBank.empty(CONFIG, slots=3, rank=4).load("legal", *LEGAL).load("chat", *CHAT)
    alone = {
        "legal": _alone(*LEGAL),
        "chat": _alone(*CHAT),
        None: _alone(None, AdapterSpec()),
    }
    assert float(jnp.abs(alone["legal"] - alone[None]).max()) > 1e-2
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(lora: Any, ids: jax.Array) -> jax.Array:
        return _logits(lora, bank.spec, TOKENS, adapter_ids=ids)

    for names in (["legal", "chat", None], ["chat", "chat", "legal"]):
        got = run(bank.lora, bank.ids(names))
        for i, name in enumerate(names):
            np.testing.assert_allclose(got[i], alone[name][i], rtol=1e-4, atol=1e-5)

    changed = bank.unload("legal").load("other", *CHAT)
    got = run(changed.lora, changed.ids(["other", None, "chat"]))
    for i, name in enumerate(["chat", None, "chat"]):
        np.testing.assert_allclose(got[i], alone[name][i], rtol=1e-4, atol=1e-5)
    emptied = bank.unload("legal")
    np.testing.assert_array_equal(trees.flatten(emptied.lora)["layers/ffn/gate_proj/b"][:, 0], 0)


def test_a_weighted_combination_is_the_sum_of_the_updates() -> None:
    lora, spec = combine_adapters([LEGAL, CHAT], [0.7, -0.4])
    flat = trees.flatten(lora)
    path = "layers/ffn/gate_proj"
    want = 0.0
    for (tree, source), weight in zip((LEGAL, CHAT), (0.7, -0.4), strict=True):
        leaves = trees.flatten(tree)
        scale = source.scales(path)[:, None, None]
        want = want + weight * scale * np.einsum("lir,lro->lio", leaves[f"{path}/a"], leaves[f"{path}/b"])
    got = spec.scales(path)[:, None, None] * np.einsum("lir,lro->lio", flat[f"{path}/a"], flat[f"{path}/b"])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert {path for path, _ in spec.targets} == {path for _, s in (LEGAL, CHAT) for path, _ in s.targets}


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda bank: bank.load("a", *LEGAL).load("b", *CHAT), "free slot.*unload"),
        (lambda bank: bank.load("a", *_adapter(3, LoRARule("gate_proj", 8))), "rank.*at most 4.*found 8"),
        (lambda bank: bank.load("a", *_adapter(3, LoRARule("gate_proj", 2), dora=True)), "DoRA"),
        (lambda bank: bank.ids(["nobody"]), "empty bank.*'nobody'"),
        (lambda bank: bank.unload("nobody"), "'nobody'"),
        (
            lambda _: AdapterBank.empty(CONFIG, slots=1, rank=4, targets=["layers/nothing"]),
            "layers/nothing",
        ),
        (lambda _: AdapterBank.empty(CONFIG, slots=0, rank=4), "at least one slot"),
        (lambda _: combine_adapters([LEGAL], [1.0, 2.0]), "one weight per adapter"),
    ],
)
def test_what_does_not_fit_is_refused(action: Any, message: str) -> None:
    with pytest.raises(NaloraError, match=message):
        action(AdapterBank.empty(CONFIG, slots=1, rank=4))


def test_a_target_that_the_bank_lacks_is_refused() -> None:
    bank = AdapterBank.empty(CONFIG, slots=1, rank=4, targets=["layers/ffn/gate_proj"])
    with pytest.raises(NaloraError, match="q_proj"):
        bank.load("legal", *LEGAL)
