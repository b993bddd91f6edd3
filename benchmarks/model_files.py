"""SmolLM2-135M-Instruct as a Hugging Face folder with a PEFT adapter, shared by every library.

    python benchmarks/model_files.py --dtype bfloat16

The files are written once. The last line printed is a JSON object with the paths: gguf, model
(safetensors in the dtype), adapter (rank 8 on gate, up and down, with random weights, so that it
changes the output).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from common import run_script

from nalora_jax.common.downloads import cache_dir
from nalora_jax.weights.hub import resolve

ALIAS = "smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    dtype = parser.parse_args().dtype
    gguf = Path(resolve(ALIAS).path)
    folder = cache_dir() / "benchmarks" / f"{ALIAS}-{dtype}"
    if not folder.exists():
        make(gguf, folder, dtype)
    print(
        json.dumps({"gguf": str(gguf), "model": str(folder / "model"), "adapter": str(folder / "adapter")})
    )


def make(gguf: Path, folder: Path, dtype: str) -> None:
    """Reads the GGUF file with transformers, to be independent of this library."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, file = gguf.parent, {"gguf_file": gguf.name}
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    read = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), **file)
    del read.config.quantization_config  # dequantized now, which transformers ignores
    model = AutoModelForCausalLM.from_config(read.config, dtype=getattr(torch, dtype))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(scratch / "model")
    AutoTokenizer.from_pretrained(where, **file).save_pretrained(scratch / "model")
    torch.manual_seed(0)
    targets = ["gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # a small change, so that the output is not noise
            parameter.data *= 0.05
    adapted.save_pretrained(scratch / "adapter")
    shutil.move(scratch, folder)


def files(dtype: str) -> dict[str, str]:
    """Returns the paths of the model and the adapter, after writing missing files in a process."""
    return run_script("model_files.py", "--dtype", dtype)


if __name__ == "__main__":
    main()
