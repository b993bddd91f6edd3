"""The gradient start against an SVD of the kernel's gradient in float64, and the start that is kept
for resuming."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.assembly import start
from nalora_jax.assembly.program import Assembly, assemble
from nalora_jax.assembly.start import gradient_adapters
from nalora_jax.common import trees
from nalora_jax.common.folders import START
from nalora_jax.config import ComputeConfig, LoRAConfig, LoRARule, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.train.output import Output
from tests import tiny
from tests.param_trees import params_from_tensors

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

TORCH = tiny.torch_llama().double()
BASE = ModelConfig.from_hf(TORCH.config.to_dict())
PARAMS = jax.tree.map(
    jnp.asarray,
    params_from_tensors(BASE, lambda name: TORCH.get_parameter(name).detach().float().numpy()),
)
RULES = (LoRARule("layers/1/ffn/gate_proj", 2), LoRARule("ffn", 3), LoRARule("q_proj", 2))

BATCHES = [tiny.whole_batch(seed, (1, 4, 12), share=0.5) for seed in range(2)]


def kernel_gradients(rows: list[dict[str, np.ndarray]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of the summed loss, by transformers in float64; and the gates' pre-activations ``[layers,
    tokens, d_ff]``."""
    seen: list[list[np.ndarray]] = [[], []]
    hooks = [
        layer.mlp.gate_proj.register_forward_hook(
            lambda _, __, z, kept=kept: kept.append(z.detach().numpy().reshape(-1, 24))
        )
        for layer, kept in zip(TORCH.model.layers, seen, strict=True)
    ]
    TORCH.zero_grad()
    for batch in rows:
        names = ("tokens", "targets", "loss_weights")
        tokens, targets, weights = (torch.tensor(np.asarray(batch[name][0])) for name in names)
        logits, targets = TORCH(tokens).logits.flatten(0, 1), targets.flatten().long()
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        (losses * weights.flatten()).sum().backward()
    for hook in hooks:
        hook.remove()
    tree = params_from_tensors(
        BASE, lambda name: TORCH.get_parameter(name).grad.numpy(), dtype=np.float64
    )
    flat = {path.removesuffix("/kernel"): leaf for path, leaf in trees.flatten(tree).items()}
    return flat, np.array([np.concatenate(one) for one in seen])


def same_directions(a: np.ndarray, expected: np.ndarray) -> None:
    """Equal columns up to their signs, each as long as LoRA's are on average."""
    length = 3**-0.5
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), length, rtol=1e-4)
    cosines = np.abs(np.sum(a * expected, axis=0)) / length
    np.testing.assert_allclose(cosines, 1.0, atol=1e-3)


@pytest.fixture(scope="module")
def made() -> Assembly:
    config = RunConfig(
        lora=LoRAConfig(rules=RULES, init="gradient", gradient_weights="slope"),
        mechanisms=(),
        compute=ComputeConfig(dtype="float32", stats_stride=1),
    )
    return assemble(config, BASE, PARAMS, tiny.one_device())


def test_a_holds_the_left_singular_vectors_of_the_weighted_gradient_and_b_is_zero(made) -> None:
    """A gate's columns are weighted by its slopes, and the placebo permutes them; other projections
    have none."""
    lora = trees.flatten(jax.device_get(gradient_adapters(made, BASE, BATCHES, seed=0)))
    (gradients, z), gate = kernel_gradients(BATCHES), "layers/ffn/gate_proj"
    sigmoid = 1 / (1 + np.exp(-z))
    slope = np.mean(np.abs(sigmoid * (1 + z * (1 - sigmoid))), axis=1)  # [layers, d_ff]
    relative = slope / slope.mean(axis=1, keepdims=True)
    assert relative.std() > 0.1
    gradients[gate] = gradients[gate] * relative[:, None, :]
    for path, target in made.spec.targets:
        assert not np.any(lora[f"{path}/b"])
        for layer, rank in enumerate(target.ranks):
            a = lora[f"{path}/a"][layer]
            u = np.linalg.svd(gradients[path][layer], full_matrices=False)[0]
            same_directions(a[:, :rank], u[:, :rank])
            assert not np.any(a[:, rank:])  # of a layer whose rank is below the stack's
    slopes, key = {"layers/ffn": jnp.asarray(slope)}, jax.random.key(0)
    weights, placebo = (
        start._weights(kind, slopes, made.spec, key)[gate] for kind in ("slope", "permuted")
    )
    np.testing.assert_array_equal(np.sort(weights), np.sort(placebo))
    assert np.abs(weights - placebo).max(axis=1).min() > 1e-2


LOADED: Any = SimpleNamespace(config=BASE)


@pytest.fixture(scope="module")
def lowering(made: Assembly) -> Assembly:
    """The same, of a run that lowers its kernels."""
    return replace(
        made, config=replace(made.config, lora=replace(made.config.lora, init="lora_ga"))
    )


@pytest.fixture
def begun(lowering: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Assembly:
    """As a run begins; its gradient can be taken once."""
    rng = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), "float32"), lowering.state.lora
    )
    found = iter([lora])
    monkeypatch.setattr(start, "first_adapters", lambda *_: next(found))
    return started(lowering, tmp_path, resumes=False)


def started(assembly: Assembly, folder: Path, *, resumes: bool = True) -> Assembly:
    rows: Any = None
    return start.prepare_start(assembly, LOADED, rows, Output(folder, resumes=resumes))


def test_a_continuation_has_the_start_to_the_bit(made, lowering, begun, tmp_path) -> None:
    assert started(made, tmp_path) is made  # nothing is lowered: its start is in the checkpoint
    again = started(lowering, tmp_path)
    kernels = (
        trees.flatten(one.params)["layers/ffn/gate_proj/kernel"] for one in (lowering, begun)
    )
    assert not np.array_equal(*kernels)
    for ours, theirs in ((again.params, begun.params), (again.initial, begun.initial)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == [START]  # no scratch files


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize(
    ("found", "harm"),
    [
        ("No such file", lambda folder: shutil.rmtree(folder)),
        (
            "not what was written",
            lambda folder: (folder / "adapter.safetensors").write_bytes(b"other"),
        ),
    ],
)
def test_a_start_that_is_not_there_or_damaged_is_refused(lowering, tmp_path, found, harm) -> None:
    harm(tmp_path / START)
    with pytest.raises(NaloraError, match=f"the adapters that the run started from.*{found}"):
        started(lowering, tmp_path)
