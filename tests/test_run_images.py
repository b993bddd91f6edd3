"""Whole runs on images, from a folder of pictures to an adapter that PEFT reads, and the verbs that use it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nalora_jax.__main__ import main
from nalora_jax.cli.config_files import load_config
from nalora_jax.cli.training import run
from nalora_jax.config import (
    ComputeConfig,
    DataConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.run_log import read_metrics
from nalora_jax.train.adapted_dual import load_adapted_dual
from nalora_jax.weights.peft import import_adapter
from tests import tiny
from tests.seeing import COLOURS


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three colours in turn, with captions; one file is damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    return tiny.make_pictures(folder, COLOURS, count=12, size=(20, 20), damaged="green1.png")


def few_shot(model: Path | str, pictures: Path, output: Path, **changes: object) -> RunConfig:
    """`configs/clip_few_shot.py` on a tiny model and a folder."""
    base = replace(
        load_config("configs/clip_few_shot.py"),
        model=str(model),
        output=str(output),
        steps=6,
        data=DataConfig(
            str(pictures),
            train_split="train[:60%]",
            eval_split="train[60%:]",
            eval_limit=9,
            select_limit=4,
            workers=1,
        ),
        train=TrainConfig(batch_size=8, log_every=2, eval_every=3, save_every=3),
        compute=ComputeConfig("float32", stats_stride=1, compilation_cache=False),
        mesh=MeshConfig(data=4, fsdp=2),
        vision=VisionConfig("classify", shots=4, templates=("a photo of a {}.", "the {} square")),
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def trained(dual_folder, pictures, tmp_path_factory) -> tuple[Path, Path]:
    """A model's folder, and that of a finished few-shot run on it, over eight devices."""
    model = dual_folder("clip")
    folder = tmp_path_factory.mktemp("runs") / "clip"
    run(few_shot(model, pictures, folder, steps=100, epochs=4.0))  # 4 images of 3 classes, 8 a step
    return model, folder


def test_a_run_leaves_an_adapter_metrics_and_a_report(trained) -> None:
    model, folder = trained
    records = read_metrics(folder / "metrics.jsonl")
    initial = next(r for r in records if r.get("initial"))
    final = next(r for r in records if r.get("final"))
    for record in (initial, final):
        values = record["eval"]
        assert values["n"] == 9
        assert np.sum(values["confusion"]) == 9
        assert values["classes"] == ["blue", "green", "red"]
        assert {sample["expected"] for sample in values["samples"]} <= set(COLOURS)
        np.testing.assert_allclose(np.trace(values["confusion"]) / 9, values["accuracy"])
    assert final["step"] <= 6 == records[-1]["done"]["step"]
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 8
    assert "Confusion" in page
    assert f"nalora eval {folder}" in page
    logged = [r for r in records if "layers" in r]
    assert len(logged[-1]["layers"]["importance"]) == 2  # the image tower's layers alone
    assert len(list((folder / "checkpoints").iterdir())) >= 1
    adapted = load_adapted_dual(str(folder))
    lora, spec = import_adapter(
        folder / "adapter", adapted.base.config, fingerprint=adapted.base.fingerprint
    )
    assert {path for path, _ in spec.targets} == {"image/layers/ffn/in_proj", "image/layers/ffn/out_proj"}
    assert max(np.abs(leaf["b"]).max() for leaf in lora["image"]["layers"]["ffn"].values()) > 0
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(model)


def test_a_resumed_run_is_the_uninterrupted_one(trained, pictures, tmp_path) -> None:
    """From its third step, as if it had been killed before the checkpoint of the sixth was written."""
    model, whole = trained
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    run(few_shot(model, pictures, tmp_path / "run", steps=100, epochs=4.0, resume=True))
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "run", whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_captions_of_two_towers_that_never_met(tower_folders, pictures, tmp_path, one_device) -> None:
    image, text = tower_folders
    settings = few_shot(
        f"{image}+{text}",
        pictures,
        tmp_path / "run",
        lora=LoRAConfig(rules=(LoRARule("ffn", 2),)),
        mesh=MeshConfig(data=1),
        steps=3,
        vision=VisionConfig("contrast", features=16, loss="sigmoid"),
    )
    result = run(settings)
    assert result.before["n"] == result.after["n"] == 9
    assert set(result.after) >= {"recall", "image_to_text_recall_1", "text_to_image_recall_5"}
    logged = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "towers" in r]
    assert logged[-1]["towers"] == {"image": 3, "text": 2}
    assert (tmp_path / "run" / "adapter" / "trained.safetensors").is_file()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "image 2" in page
    assert "recall at 1" in page.lower()
    adapted = load_adapted_dual(str(tmp_path / "run"))
    assert adapted.base.config.image.d_out == 16


def test_the_page_classifies_and_retrieves(trained, pictures) -> None:
    _, folder = trained
    page = (Path(__file__).parent.parent / "docs" / "images.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    code = code.replace("runs/eurosat", str(folder)).replace('Path("pictures").glob("*.png")', "chosen")
    space = {"chosen": [pictures / f"{colour}0.png" for colour in COLOURS]}
    exec(code, space)
    np.testing.assert_allclose(space["shares"].sum(axis=-1), 1.0, rtol=1e-5)
    assert space["shares"].shape == (3, 2)
    np.testing.assert_allclose(np.linalg.norm(space["features"], axis=-1), 1.0, rtol=1e-5)
    cosines = (space["features"] @ space["query"].T)[:, 0]
    np.testing.assert_array_equal(space["best_first"], np.argsort(-cosines))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_verbs_that_take_every_run_take_these(trained, tmp_path, capsys) -> None:
    """`eval` measures what the run reported; `export` and `merge` write what PEFT and transformers load."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model, folder = trained
    assert main(["eval", str(folder), "--output", str(tmp_path / "numbers.json")]) == 0
    final = next(r for r in read_metrics(folder / "metrics.jsonl") if r.get("final"))["eval"]
    assert f"held-out accuracy {final['accuracy']:.3f}" in capsys.readouterr().out
    assert json.loads((tmp_path / "numbers.json").read_text())["confusion"] == final["confusion"]
    assert main(["export", str(folder), "--output", str(tmp_path / "adapter")]) == 0
    assert main(["merge", str(folder), "--output", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    base = transformers.CLIPModel.from_pretrained(model)
    merged = transformers.CLIPModel.from_pretrained(tmp_path / "merged").eval()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
        "input_ids": torch.tensor([[3, 5, 6, 2], [3, 7, 8, 2]]),
    }
    with torch.no_grad():
        found = [one(**inputs).logits_per_image.numpy() for one in (merged, adapted)]
    np.testing.assert_allclose(*found, atol=1e-4)
    assert load_adapted_dual(str(tmp_path / "merged")).lora is None
    assert main(["export", str(folder), "--output", str(tmp_path / "vllm"), "--for", "vllm"]) == 2
    assert "peft for image and text encoders" in capsys.readouterr().err


def test_settings_that_do_not_fit_are_refused(trained, pictures, tmp_path) -> None:
    model, _ = trained
    settings = few_shot(model, pictures, tmp_path / "run")
    for changes, message in (
        ({"vision": VisionConfig("classify", templates=("no name",))}, "--vision.templates"),
        ({"vision": VisionConfig("classify", classes=("red", "green"))}, "one of 2 classes"),
        ({"vision": VisionConfig("contrast", caption_field="title")}, "--vision.caption-field"),
        ({"vision": VisionConfig("classify", broken="error", shots=0)}, "green1.png"),
        ({"data": replace(settings.data, eval_split="train[50%:]")}, "--data.eval-split"),
        ({"lora": LoRAConfig(init="pissa")}, "--lora.init"),
        ({"compute": ComputeConfig(quantize="int8")}, "--compute.quantize"),
    ):
        with pytest.raises(NaloraError, match=message):
            run(replace(settings, output=str(tmp_path / message.strip("-").replace(".", "_")), **changes))
