"""Three steps of every kind of adapter beside PEFT's own: the same start, rows and AdamW give the
same updates."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.assembly.program import Assembly, assemble
from nalora_jax.assembly.start import gradient_adapters, split_components, start_from
from nalora_jax.common import trees
from nalora_jax.config import (
    AdaLoRAConfig,
    ComputeConfig,
    LoRAConfig,
    LoRARule,
    OptimizerConfig,
    RunConfig,
)
from nalora_jax.models.config import ModelConfig
from tests import tiny
from tests.param_trees import params_from_tensors

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
optimizers = pytest.importorskip("peft.optimizers")
pytestmark = pytest.mark.filterwarnings("default")  # of torch, transformers and PEFT

RANK, ALPHA, RATIO = 4, 12.0, 8.0
# eps: gradients of zero but for rounding move nothing.
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, schedule="constant", warmup_share=0, clip_norm=0, weight_decay=0.1, eps=1e-5
)
PROJECTIONS = {
    "layers/attn/q_proj": "self_attn.q_proj",
    "layers/ffn/gate_proj": "mlp.gate_proj",
    "layers/ffn/up_proj": "mlp.up_proj",
    "layers/ffn/down_proj": "mlp.down_proj",
}
NAMES = [name.rpartition(".")[2] for name in PROJECTIONS.values()]
# PEFT's names of an adapter's arrays, and ours.
ARRAYS = {"lora_A": "a", "lora_B": "b", "lora_E": "singular", "lora_magnitude_vector": "magnitude"}
# Settings of ours and of PEFT's, by method.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DoRA": ({"dora": True}, {"use_dora": True}),
    "rsLoRA, LoRA+": ({"rslora": True, "plus_ratio": RATIO}, {"use_rslora": True}),
    "PiSSA": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "LoRA-GA": ({"init": "lora_ga"}, {"init_lora_weights": "lora_ga"}),
}


@pytest.fixture(scope="module")
def base() -> tuple[Any, ModelConfig, Any]:
    """A random Llama as transformers have it, its description, and its weights as ours."""
    model = tiny.torch_llama()
    config = ModelConfig.from_hf(model.config.to_dict())
    params = params_from_tensors(config, lambda name: model.get_parameter(name).detach().numpy())
    return model, config, jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    """The compiled step on lowered kernels: one program, whatever they were lowered by."""
    return {}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, np.ndarray]]:
    """A batch for each step."""
    return [tiny.whole_batch(seed, (1, 4, 12), share=0.5) for seed in range(3)]


def our_start(
    base: tuple[Any, ModelConfig, Any], first: dict[str, np.ndarray], method: str, **more: Any
) -> Assembly:
    rules = (LoRARule("ffn/(gate|up|down)_proj|q_proj", RANK, ALPHA),)
    config = RunConfig(
        lora=LoRAConfig(rules=rules, **METHODS.get(method, ({}, {}))[0]),
        mechanisms=(),
        optimizer=OPTIMIZER,
        compute=ComputeConfig(dtype="float32"),
        **more,
    )
    made = assemble(config, *base[1:], tiny.one_device())
    if method == "LoRA-GA":
        return start_from(made, gradient_adapters(made, base[1], [first], 0))
    return split_components(made) if method == "PiSSA" else made


def their_start(
    base: tuple[Any, ModelConfig, Any], first: dict[str, np.ndarray], method: str
) -> Any:
    model, own = copy.deepcopy(base[0]), METHODS[method][1]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=NAMES, task_type="CAUSAL_LM", **own
    )
    if method == "LoRA-GA":
        config.lora_ga_config = peft.LoraGAConfig()
        peft.preprocess_loraga(model, config, lambda: their_loss(model, first).backward())
    return peft.get_peft_model(model, config)


def their_loss(model: Any, batch: dict[str, np.ndarray]) -> Any:
    """Mean over the target tokens."""
    tokens, targets, weights = (
        torch.tensor(np.asarray(batch[n][0])) for n in ("tokens", "targets", "loss_weights")
    )
    logits = model(tokens).logits.flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, targets.flatten().long(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def places(theirs: Any) -> Iterator[tuple[str, int, Any]]:
    """Path, layer and PEFT's module of every adapter."""
    layers = theirs.get_base_model().model.layers
    for path, name in PROJECTIONS.items():
        for index, layer in enumerate(layers):
            yield path, index, layer.get_submodule(name)


def arrays(theirs: Any) -> Iterator[tuple[str, int, Any]]:
    """Path of ours, layer and PEFT's parameter of every array of an adapter."""
    for path, index, module in places(theirs):
        for name, own in ARRAYS.items():
            for parameter in getattr(module, name, {}).values():
                yield f"{path}/{own}", index, getattr(parameter, "weight", parameter)


def their_adapters(theirs: Any) -> dict[str, np.ndarray]:
    """As a flat tree of ours."""
    found: dict[str, list[np.ndarray]] = {}
    for path, _, parameter in arrays(theirs):
        found.setdefault(path, []).append(parameter.detach().numpy().T.copy())
    stacks = {path: np.stack(layers) for path, layers in found.items()}
    return {path: x.squeeze(1) if path.endswith("/singular") else x for path, x in stacks.items()}


def give(theirs: Any, ours: Assembly) -> None:
    """Put our adapters and kernels into PEFT's model: singular vectors are determined up to their
    signs alone."""
    lora, params = trees.flatten(ours.state.lora), trees.flatten(ours.params)
    with torch.no_grad():
        for path, index, parameter in arrays(theirs):
            parameter.copy_(torch.tensor(np.asarray(lora[path][index]).T).reshape(parameter.shape))
        for path, index, module in places(theirs):
            module.base_layer.weight.copy_(
                torch.tensor(np.asarray(params[f"{path}/kernel"][index]).T)
            )


def check_start(ours: Assembly, theirs: Any, method: str) -> None:
    """What PEFT starts from is what we start from, as far as it is determined."""
    lora, params = trees.flatten(ours.state.lora), trees.flatten(ours.params)
    adapters = their_adapters(theirs)
    near = (
        1e-3 if method == "PiSSA" else 1e-5
    )  # ours takes a randomized decomposition, PEFT an exact one
    assert lora.keys() == adapters.keys()
    for path, index, module in places(theirs):
        assert module.scaling["default"] == pytest.approx(float(ours.spec.scales(path)[index]))
        a, b = (np.asarray(lora[f"{path}/{name}"][index]) for name in "ab")
        their_a, their_b = (adapters[f"{path}/{name}"][index] for name in "ab")
        if method == "LoRA-GA":  # PEFT leaves A at length 1 and multiplies B by the singular values
            for one, other in ((a, their_a), (b.T, their_b.T)):
                lengths = np.linalg.norm(one, axis=0) * np.linalg.norm(other, axis=0)
                np.testing.assert_allclose(
                    np.abs(np.sum(one * other, axis=0)) / lengths, 1.0, atol=1e-3
                )
            continue
        np.testing.assert_allclose(a @ b, their_a @ their_b, atol=near)
        kernel = module.base_layer.weight.detach().numpy().T
        np.testing.assert_allclose(params[f"{path}/kernel"][index], kernel, atol=near)
    for path in (path for path in lora if path.endswith("/magnitude")):
        np.testing.assert_allclose(lora[path], adapters[path], rtol=1e-5)


def their_optimizer(theirs: Any, method: str) -> Any:
    settings = {
        "lr": OPTIMIZER.learning_rate,
        "betas": (OPTIMIZER.b1, OPTIMIZER.b2),
        "eps": OPTIMIZER.eps,
    }
    if method.endswith("LoRA+"):
        more = {"loraplus_lr_ratio": RATIO, "loraplus_weight_decay": OPTIMIZER.weight_decay}
        return optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, **settings, **more)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, weight_decay=OPTIMIZER.weight_decay, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_updates_are_those_of_peft(base, rows, steps, method) -> None:
    ours, theirs = our_start(base, rows[0], method), their_start(base, rows[0], method)
    check_start(ours, theirs, method)
    give(theirs, ours)
    with torch.no_grad():  # every method starts as the base
        of_base, of_adapter = (their_loss(model, rows[0]).item() for model in (base[0], theirs))
    assert of_adapter == pytest.approx(of_base, rel=1e-5)
    optimizer, state = their_optimizer(theirs, method), ours.state
    train = ours.step if ours.initial is None else steps.setdefault("lowered", ours.step)
    start = {path: np.asarray(leaf) for path, leaf in trees.flatten(state.lora).items()}
    if method in ("PiSSA", "LoRA-GA"):
        assert min(np.abs(leaf).max() for path, leaf in start.items() if path.endswith("/b")) > 0.01
    for step, batch in enumerate(rows, start=1):
        state, metrics = train(ours.params, state, batch)
        loss = their_loss(theirs, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        np.testing.assert_allclose(float(metrics["loss"]), loss.item(), rtol=1e-5)
        lora, adapters = trees.flatten(jax.device_get(state.lora)), their_adapters(theirs)
        for path, before in start.items():
            faster = method.endswith("LoRA+") and path.endswith("/b")
            rate = OPTIMIZER.learning_rate * (RATIO if faster else 1.0)
            moved, their_moved = lora[path] - before, adapters[path] - before
            still = step == 1 and path.endswith("/a")  # where B is 0
            assert np.abs(their_moved).max() > 0.5 * rate or still
            where = f"{path}, step {step}"
            np.testing.assert_allclose(moved, their_moved, atol=2e-3 * rate * step, err_msg=where)


# As settings of ours: of 20 steps the first 4 have all ranks, and the ranks of step 15 stay.
ADALORA = AdaLoRAConfig(
    target_rank=2, warmup_share=0.2, final_share=0.25, interval=3, orthogonality=0.5
)


def test_adalora_is_that_of_peft(base: Any, rows: list[dict[str, np.ndarray]]) -> None:
    """20 steps: the same weights, and the same components taken, in all phases."""
    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=ADALORA.target_rank, lora_alpha=ALPHA, tinit=4, tfinal=5, deltaT=ADALORA.interval,
        beta1=ADALORA.sensitivity_decay, beta2=ADALORA.uncertainty_decay, orth_reg_weight=ADALORA.orthogonality,
        total_step=20, target_modules=NAMES, task_type="CAUSAL_LM",
    )  # fmt: skip
    ours = our_start(base, rows[0], "AdaLoRA", adalora=ADALORA, steps=20)
    theirs = peft.get_peft_model(copy.deepcopy(base[0]), config)
    give(theirs, ours)
    tuner, optimizer, state = theirs.base_model, their_optimizer(theirs, "AdaLoRA"), ours.state
    for name, value in their_adapters(theirs).items():
        assert np.abs(value).max() == pytest.approx(
            0.0 if name.endswith("/singular") else 0.08, abs=0.04
        )
    taken = []
    for step in range(1, 21):
        batch = rows[step % len(rows)]
        state, _ = ours.step(ours.params, state, batch)
        optimizer.zero_grad()
        penalised(theirs, their_loss(theirs, batch)).backward()
        optimizer.step()
        tuner.update_and_allocate(step)
        lora, adapters = trees.flatten(jax.device_get(state.lora)), their_adapters(theirs)
        assert lora.keys() == adapters.keys()
        for path, value in adapters.items():
            np.testing.assert_allclose(lora[path], value, atol=1e-4, err_msg=f"{path}, step {step}")
        zeros = {path: value == 0 for path, value in adapters.items() if path.endswith("/singular")}
        assert all(np.array_equal(lora[path] == 0, value) for path, value in zeros.items())
        taken.append(sum(int(value.sum()) for value in zeros.values()))
    assert taken[3] == 0 < taken[5] < taken[8] < taken[14]  # budgets that fall
    assert taken[14:] == [len(list(places(theirs))) * (RANK - ADALORA.target_rank)] * 6


def penalised(theirs: Any, loss: Any) -> Any:
    """``loss`` with PEFT's penalty, which its forward pass adds to losses that it computes
    itself."""
    output, tuner = SimpleNamespace(loss=loss.clone()), theirs.base_model
    inner, tuner.model.forward = tuner.model.forward, lambda: output
    try:
        return tuner.forward().loss
    finally:
        tuner.model.forward = inner
