"""Whole runs on images, from a folder of pictures to an adapter that PEFT reads, and the verbs that use it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nalora_jax import config as cfg
from nalora_jax.__main__ import main
from nalora_jax.cli.config_files import load_config
from nalora_jax.cli.training import run
from nalora_jax.errors import NaloraError
from nalora_jax.train.adapted_dual import load_adapted_dual
from nalora_jax.weights.peft import import_adapter
from tests import tiny
from tests.seeing import COLOURS


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three colours in turn, with captions; one file is damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    return tiny.make_pictures(folder, COLOURS, count=12, size=(20, 20), damaged="green1.png")


def few_shot(model: Path | str, pictures: Path, output: Path, **changes: Any) -> cfg.RunConfig:
    """`configs/clip_few_shot.py` on a tiny model and a folder: 4 images of 3 classes, 8 a step."""
    splits = {"train_split": "train[:60%]", "eval_split": "train[60%:]", "eval_limit": 9, "select_limit": 4}
    settings: dict[str, Any] = {
        "model": str(model),
        "output": str(output),
        "steps": 100,
        "epochs": 4.0,
        "data": cfg.DataConfig(str(pictures), workers=1, **splits),
        "train": cfg.TrainConfig(batch_size=8, log_every=2, eval_every=3, save_every=3),
        "compute": cfg.ComputeConfig("float32", stats_stride=1, compilation_cache=False),
        "mesh": cfg.MeshConfig(data=4, fsdp=2),
        "vision": cfg.VisionConfig("classify", shots=4, templates=("a photo of a {}.", "the {} square")),
    }
    return replace(load_config("configs/clip_few_shot.py"), **(settings | changes))


@pytest.fixture(scope="module")
def trained(dual_folder, pictures, tmp_path_factory) -> tuple[Path, Path]:
    """A model's folder, and that of a finished few-shot run on it, over eight devices."""
    model = dual_folder("clip")
    folder = tmp_path_factory.mktemp("runs") / "clip"
    run(few_shot(model, pictures, folder))
    return model, folder


def evaluated(folder: Path, name: str) -> dict[str, Any]:
    """The evaluation named "initial" or "final" in a run's log."""
    return next(line["eval"] for line in tiny.lines(folder) if name in line)


def test_a_run_leaves_an_adapter_metrics_and_a_report(trained) -> None:
    model, folder = trained
    for values in (evaluated(folder, "initial"), evaluated(folder, "final")):
        assert (values["n"], np.sum(values["confusion"])) == (9, 9)
        assert values["classes"] == ["blue", "green", "red"]
        assert {sample["expected"] for sample in values["samples"]} <= set(COLOURS)
        np.testing.assert_allclose(np.trace(values["confusion"]) / 9, values["accuracy"])
    lines = tiny.lines(folder)
    assert lines[-1]["done"]["step"] == 6
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 8
    assert "Confusion" in page
    assert f"nalora eval {folder}" in page
    logged = [line["layers"] for line in lines if "layers" in line]
    assert len(logged[-1]["importance"]) == 2  # the image tower's layers alone
    base = load_adapted_dual(str(folder)).base
    lora, spec = import_adapter(folder / "adapter", base.config, fingerprint=base.fingerprint)
    assert {path for path, _ in spec.targets} == {"image/layers/ffn/in_proj", "image/layers/ffn/out_proj"}
    assert max(np.abs(leaf["b"]).max() for leaf in lora["image"]["layers"]["ffn"].values()) > 0
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model)


def test_a_resumed_run_is_the_uninterrupted_one(trained, pictures, tmp_path) -> None:
    """From its third step, as if it had been killed before the checkpoint of the sixth was written."""
    model, whole = trained
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    run(few_shot(model, pictures, tmp_path / "run", resume=True))
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "run", whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_page_classifies_and_retrieves(trained, pictures) -> None:
    page = (Path(__file__).parent.parent / "docs" / "images.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    code = code.replace("runs/eurosat", str(trained[1])).replace('Path("pictures").glob("*.png")', "chosen")
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
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    model, folder = trained
    assert main(["eval", str(folder), "--output", str(tmp_path / "numbers.json")]) == 0
    final = evaluated(folder, "final")
    assert f"held-out accuracy {final['accuracy']:.3f}" in capsys.readouterr().out
    assert json.loads((tmp_path / "numbers.json").read_text())["confusion"] == final["confusion"]
    assert main(["export", str(folder), "--output", str(tmp_path / "adapter")]) == 0
    assert main(["merge", str(folder), "--output", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    base = transformers.CLIPModel.from_pretrained(model)
    merged = transformers.CLIPModel.from_pretrained(tmp_path / "merged").eval()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": pixels, "input_ids": torch.tensor([[3, 5, 6, 2], [3, 7, 8, 2]])}
    with torch.no_grad():
        found = [one(**inputs).logits_per_image.numpy() for one in (merged, adapted)]
    np.testing.assert_allclose(*found, atol=1e-4)
    assert load_adapted_dual(str(tmp_path / "merged")).lora is None
    assert main(["export", str(folder), "--output", str(tmp_path / "vllm"), "--for", "vllm"]) == 2
    assert "peft for image and text encoders" in capsys.readouterr().err


def test_settings_that_do_not_fit_are_refused(trained, pictures, tmp_path) -> None:
    settings = few_shot(trained[0], pictures, tmp_path / "run", steps=6, epochs=0.0)
    for message, changes in {
        "--vision.templates": {"vision": cfg.VisionConfig("classify", templates=("no name",))},
        "one of 2 classes": {"vision": cfg.VisionConfig("classify", classes=("red", "green"))},
        "--data.eval-split": {"data": replace(settings.data, eval_split="train[50%:]")},
        "--lora.init": {"lora": cfg.LoRAConfig(init="pissa")},
        "--compute.quantize": {"compute": cfg.ComputeConfig(quantize="int8")},
    }.items():
        with pytest.raises(NaloraError, match=message):
            run(replace(settings, **changes))
