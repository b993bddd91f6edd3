"""Runs that continue an adapter on disk: PEFT trains, this library continues, PEFT continues."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from nalora_jax import job
from nalora_jax.config import LoRAConfig, OptimizerConfig, RunConfig, TrainConfig
from nalora_jax.loading.adapted import load
from nalora_jax.loading.initial_adapter import with_adapter
from nalora_jax.runs.output import open_output
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("default")  # of torch, transformers and PEFT

# Settings of PEFT's adapters.
ADAPTERS: dict[str, dict[str, Any]] = {
    "rslora-and-table": {
        "r": 16,
        "lora_alpha": 32,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        "modules_to_save": ["embed_tokens"],
    },
    "dora": {
        "r": 4,
        "lora_alpha": 6,
        "use_dora": True,
        "target_modules": ["gate_proj", "up_proj", "down_proj", "o_proj"],
    },
    "ranks-and-rows": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"up_proj": 2, "layers.1.mlp.down_proj": 3},
        "alpha_pattern": {"up_proj": 5},
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 27]},
    },
}
TOKENS = np.array([[2, 9, 27, 0, 4, 8, 27, 0]])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("adapters")
    with tiny.on_one_device(folder / "cache"):
        yield tiny.make_config(
            folder,
            steps=50,
            lora=LoRAConfig(),
            mechanisms=(),
            optimizer=OptimizerConfig(learning_rate=5e-3),
            train=TrainConfig(batch_size=8, log_every=10, eval_every=0, save_every=0),
        )


def their_base(config: RunConfig) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def their_steps(model: Any, config: RunConfig, steps: int, rate: float = 5e-3) -> list[float]:
    """Trains PEFT's model on the training questions; returns the loss before each step and at the end."""
    lines = Path(config.data.dataset).read_text().splitlines()[:48]
    ids = {word: index for index, word in enumerate(tiny.WORDS)}
    words = [[*(json.loads(line)["prompt"] + " z").split(), "<end>"] for line in lines]
    tokens = torch.tensor([[ids[word] for word in row] for row in words])
    labels = tokens.clone()
    labels[:, :2] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(steps + 1):
        loss = model(tokens, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if len(losses) <= steps:
            optimizer.step()
    return losses


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_goes_from_peft_to_a_run_and_back(config: RunConfig, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **ADAPTERS[kind])
    theirs = peft.get_peft_model(their_base(config), settings)
    first = their_steps(theirs, config, 5)
    theirs.save_pretrained(tmp_path / "theirs")
    # ---------------------------------------------------------------- from PEFT
    run = replace(config, adapter=str(tmp_path / "theirs"), output=str(tmp_path / "run"))
    settled = with_adapter(run)
    with open_output(tmp_path / "start", resume=False) as output:
        inputs = job.inputs_of(settled, None)
        assembly = inputs.pieces(inputs.config, output, job.mesh_of(inputs.config)).assembly
    variables = {"params": assembly.params, "lora": assembly.state.lora}
    ours = tiny.logits_of(assembly.eval_model, variables, jnp.asarray(TOKENS))
    np.testing.assert_allclose(ours, their_logits(theirs), rtol=2e-4, atol=2e-4)
    # ---------------------------------------------------------------- 50 steps here
    result = job.run(run)
    loaded = load(run.output, dtype="float32")
    ours = tiny.logits_of(loaded.module, loaded.variables, jnp.asarray(TOKENS))
    # ---------------------------------------------------------------- back to PEFT
    back = peft.PeftModel.from_pretrained(their_base(config), str(result.adapter), is_trainable=True)
    np.testing.assert_allclose(ours, their_logits(back), rtol=2e-4, atol=2e-4)
    files = [load_file(f / "adapter_model.safetensors") for f in (tmp_path / "theirs", result.adapter)]
    assert files[0].keys() == files[1].keys()
    assert {n: t.shape for n, t in files[0].items()} == {n: t.shape for n, t in files[1].items()}
    then = their_steps(back, config, 5, 1e-3)
    print(kind, first, tiny.losses(run.output), then)
    assert first[0] > first[-1] > then[0] > then[-1]
