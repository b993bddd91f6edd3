"""Model folders with a tokenizer of words, and the memory that loading one takes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from nalora_jax.models.config import ModelConfig
from nalora_jax.weights.keymaps import keymap_for

RAW: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# 243 MB in bfloat16, in leaves of 67 MB.
WIDE = {"hidden_size": 1024, "head_dim": 256, "intermediate_size": 4096, "num_hidden_layers": 8}


def tokenizer_files(folder: Path, size: int = 48) -> None:
    vocabulary = {"</s>": 0} | {f"t{i}": i for i in range(1, size)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "</s>"}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def write_folder(folder: Path, raw: dict[str, Any] = RAW) -> dict[str, np.ndarray]:
    """A model folder with one safetensors file of random float32; returns its tensors."""
    folder.mkdir(exist_ok=True)
    rng, keymap = np.random.default_rng(0), keymap_for(ModelConfig.from_hf(raw), "hf")
    tensors = {t.name: rng.normal(size=t.shape).astype(np.float32) for t in keymap.tensors}
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer_files(folder, raw["vocab_size"])
    save_file(tensors, folder / "model.safetensors")
    return tensors


def loaded_and_peak(folder: Path, raw: dict[str, Any], kinds: Sequence[str | None]) -> list[list[float]]:
    """Megabytes of a model of ones in each quantization, and by how much the peak of a process grows."""
    shapes = {t.name: t.shape for t in keymap_for(ModelConfig.from_hf(raw), "hf").tensors}
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer_files(folder, raw["vocab_size"])
    ones = {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    save_file(ones, folder / "model.safetensors")
    code = f"""
        import gc, re, sys
        import jax
        from nalora_jax.common.trees import size_bytes
        from nalora_jax.weights.base import load_model
        # not getrusage, whose peak a child process inherits from its parent
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1e3
        jax.block_until_ready(jax.numpy.ones(3) + 1)
        for kind in {kinds!r}:
            gc.collect()
            open("/proc/self/clear_refs", "w").write("5")  # starts a new peak
            before = peak()
            model = load_model(sys.argv[1], dtype="bfloat16", quantized=kind)
            print(size_bytes(model.params) / 1e6, peak() - before)
            del model
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [list(map(float, line.split())) for line in printed.splitlines()]
