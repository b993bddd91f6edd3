"""Generated tokens per second with an adapter and a KV cache, against transformers' `generate`.

    python benchmarks/generation.py --dtype bfloat16 --batch 1
    python benchmarks/generation.py --dtype float32 --batch 16
    python benchmarks/generation.py --search --dtype float32 --batch 1    # find transformers' fastest setting
    python benchmarks/generation.py --search --dtype float32 --batch 1 --settings sdpa eager       # among these

SmolLM2-135M-Instruct with a rank 8 adapter on gate, up and down, not merged; greedy; 64 prompt
tokens and 128 new ones, end-of-text ignored, so that both libraries generate the same number of
tokens. Each process generates --repeats times after a warm-up (compilation). In float32 both must
generate equal tokens. transformers runs at its fastest setting for the dtype and batch, found by
--search: attention sdpa or eager, cache dynamic or static, the forward pass compiled or not; always
in inference mode, with adapters in the model's dtype.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common import add_rounds, compare, fastest, peak_rss_mb, random_tokens, script, search
from model_files import files
from tables import Row, at_least, compared_runs, requirements

TITLE = "Generation against transformers"
SHORT = "Generation, transformers"
PROMPT, NEW = 64, 128
# transformers' settings: attention implementation, cache, torch.compile of the forward pass.
SETTINGS = {
    "sdpa": ("sdpa", None, False),
    "eager": ("eager", None, False),
    "sdpa static": ("sdpa", "static", False),
    "eager static": ("eager", "static", False),
    "sdpa static compiled": ("sdpa", "static", True),
    "eager static compiled": ("eager", "static", True),
}


def prompts(batch: int) -> Any:
    """Returns ``[batch, PROMPT]`` tokens."""
    return random_tokens(1, batch, PROMPT, 49152)[0]


def generate_ours(options: argparse.Namespace) -> Any:
    """Returns a function that generates once and returns the new tokens."""
    from nalora_jax.evaluate.generate import Generator
    from nalora_jax.train.adapted import load

    adapted = load(options.model, adapter=options.adapter, dtype=options.dtype)
    generator = Generator(adapted.module, adapted.variables, adapted.base.tokenizer)
    rows = prompts(options.batch).tolist()

    def generate() -> list[list[int]]:
        completions = generator.complete(rows, batch_size=options.batch, max_new_tokens=NEW, stop_ids=())
        return [list(completion.ids) for completion in completions]

    return generate


def generate_theirs(options: argparse.Namespace) -> Any:
    """Returns the same function for transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    attention, cache, compiled = SETTINGS[options.setting]
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation=attention
    )
    model = PeftModel.from_pretrained(model, options.adapter, autocast_adapter_dtype=False).eval()
    base = model.get_base_model()
    base.generation_config.eos_token_id = None
    if compiled:
        base.forward = torch.compile(base.forward)
    rows = torch.from_numpy(prompts(options.batch))
    cache_options = {"cache_implementation": cache, "disable_compile": True} if cache else {}

    def generate() -> list[list[int]]:
        with torch.inference_mode():
            settings = {"do_sample": False, "max_new_tokens": NEW, **cache_options}
            generated = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **settings)
        return generated[:, PROMPT:].tolist()

    return generate


def one(options: argparse.Namespace) -> None:
    """Runs the measured process."""
    generate = (generate_ours if options.one == "nalora_jax" else generate_theirs)(options)
    generate()
    speeds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        generated = generate()
        speeds.append(options.batch * NEW / (time.perf_counter() - start))
    assert all(len(row) == NEW for row in generated), "every row is of full length"
    print(json.dumps({"tokens_per_second": speeds, "tokens": generated[0], "peak_rss_mb": peak_rss_mb()}))


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns one row per dtype and batch."""
    return [
        compared_runs(
            f"tokens/s, {case}", result["runs"], "transformers", "tokens_per_second", at_least(1.5)
        )
        for case, result in record["cases"].items()
    ]


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record), other="transformers")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--search", action="store_true", help="compare transformers' settings")
    parser.add_argument(
        "--settings", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS), help="of --search"
    )
    parser.add_argument("--setting", choices=tuple(SETTINGS), help="transformers' (default: the fastest)")
    parser.add_argument("--one", choices=("nalora_jax", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    add_rounds(parser, 2)
    options = parser.parse_args()
    case = f"{options.dtype}, batch {options.batch}"
    options.setting = options.setting or fastest("generation", case, "sdpa")
    if options.one:
        one(options)
        return
    paths = files(options.dtype)
    work = ["--dtype", options.dtype, "--batch", options.batch, "--repeats", options.repeats]
    work += ["--model", paths["model"], "--adapter", paths["adapter"]]

    def process(name: str, setting: str) -> list[str]:
        return script("generation.py", "--one", name, "--setting", setting, *work)

    if options.search:
        commands = {setting: process("transformers", setting) for setting in options.settings}
        search("generation", case, commands, "tokens_per_second", options)
        return
    commands = {name: process(name, options.setting) for name in ("nalora_jax", "transformers")}
    record = compare("generation", case, commands, options)
    print(table(record))
    runs = next(iter(record["cases"].values()))["runs"]
    same = runs["nalora_jax"][-1]["tokens"] == runs["transformers"][-1]["tokens"]
    print(f"the same tokens: {same}")


if __name__ == "__main__":
    main()
