"""Whole runs on images: dual encoders on pictures of classes, decoders on conversations, and the
verbs after them."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from nalora_jax import config as cfg
from nalora_jax.__main__ import main
from nalora_jax.cli.config_files import load_config
from nalora_jax.cli.training import run
from nalora_jax.common.trees import flatten
from nalora_jax.data.images.image_chat import question_tokens
from nalora_jax.errors import NaloraError
from nalora_jax.loading.adapted import load
from nalora_jax.loading.adapted_dual import load_adapted_dual
from nalora_jax.weights.peft_import import import_adapter
from tests import tiny, vision
from tests.vision import COLOURS, QUESTION

torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
AutoModel = transformers.AutoModelForImageTextToText
checkpointing = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
TOWERS = {"image": 3, "layers": 2}
DATA: dict[str, Any] = {"train_split": "train[:60%]", "eval_split": "train[60%:]", "workers": 1}
DATA |= {"eval_limit": 9, "select_limit": 4}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations about pictures of three colours, which have captions as well; one picture is
    damaged."""
    return vision.make_chats(tmp_path_factory.mktemp("chats"), damaged="green1.png")


def few_shot(model: Path, chats: Path, output: Path, **changes: Any) -> cfg.RunConfig:
    """`configs/clip_few_shot.py` on a tiny model and a folder: 4 images of 3 classes, 8 a step."""
    settings: dict[str, Any] = {
        "model": str(model),
        "output": str(output),
        "steps": 100,
        "epochs": 4.0,
        "data": cfg.DataConfig(str(chats.parent / "captions.csv"), **DATA),
        "train": cfg.TrainConfig(batch_size=8, log_every=2, eval_every=3, save_every=3),
        "compute": cfg.ComputeConfig("float32", stats_stride=1, compilation_cache=False),
        "mesh": cfg.MeshConfig(data=4, fsdp=2),
        "vision": cfg.VisionConfig(
            "classify", shots=4, templates=("a photo of a {}.", "the {} square")
        ),
    }
    return replace(load_config("configs/clip_few_shot.py"), **(settings | changes))


def chat(model: Path, chats: Path, output: Path, **changes: Any) -> cfg.RunConfig:
    """`configs/llava_chat.py` on a tiny model and a file."""
    base = load_config("configs/llava_chat.py")
    settings: dict[str, Any] = {
        "model": str(model),
        "output": str(output),
        "steps": 8,
        "lora": cfg.LoRAConfig(rules=(cfg.LoRARule("image/.*ffn", 2), cfg.LoRARule("", 8))),
        "data": replace(base.data, dataset=str(chats), max_length=96, **DATA),
        "train": cfg.TrainConfig(batch_size=8, log_every=4, eval_every=0, save_every=8),
        "compute": cfg.ComputeConfig("float32", stats_stride=1, compilation_cache=False),
        "mesh": cfg.MeshConfig(data=2, fsdp=2, tensor=2),
        "optimizer": replace(base.optimizer, learning_rate=5e-2),
    }
    return replace(base, **(settings | changes))


@pytest.fixture(scope="module")
def trained(dual_folder, chats, tmp_path_factory) -> tuple[Path, Path]:
    """A dual encoder's folder, and that of a finished few-shot run on it, over eight devices."""
    model, folder = dual_folder("clip"), tmp_path_factory.mktemp("runs") / "clip"
    run(few_shot(model, chats, folder))
    return model, folder


@pytest.fixture(scope="module")
def chatting(vision_folder, chats, tmp_path_factory) -> tuple[Path, Path]:
    """A decoder's folder, and that of a finished run on it."""
    model, folder = vision_folder("gemma3"), tmp_path_factory.mktemp("runs") / "gemma3"
    run(chat(model, chats, folder))
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
    assert tiny.lines(folder)[-1]["done"]["step"] == 6
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 8
    assert "Confusion" in page
    assert f"nalora eval {folder}" in page
    assert (
        len(list(tiny.logged(folder, "layers").values())[-1]["importance"]) == 2
    )  # the image tower's alone
    base = load_adapted_dual(str(folder)).base
    lora, spec = import_adapter(folder / "adapter", base.config, fingerprint=base.fingerprint)
    assert {path for path, _ in spec.targets} == {
        "image/layers/ffn/in_proj",
        "image/layers/ffn/out_proj",
    }
    assert max(np.abs(leaf["b"]).max() for leaf in lora["image"]["layers"]["ffn"].values()) > 0
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model)


def test_a_resumed_run_is_the_uninterrupted_one(trained, chats, tmp_path) -> None:
    """From its third step, as if it had been killed before the checkpoint of the sixth was
    written."""
    model, whole = trained
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    run(few_shot(model, chats, tmp_path / "run", resume=True))
    files = [
        folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "run", whole)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_page_classifies_and_retrieves(trained, chats) -> None:
    page = (Path(__file__).parent.parent / "docs" / "images.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    code = code.replace("runs/eurosat", str(trained[1])).replace(
        'Path("pictures").glob("*.png")', "chosen"
    )
    space = {"chosen": [chats.parent / f"{colour}0.png" for colour in COLOURS]}
    exec(code, space)
    np.testing.assert_allclose(space["shares"].sum(axis=-1), 1.0, rtol=1e-5)
    assert space["shares"].shape == (3, 2)
    np.testing.assert_allclose(np.linalg.norm(space["features"], axis=-1), 1.0, rtol=1e-5)
    cosines = (space["features"] @ space["query"].T)[:, 0]
    np.testing.assert_array_equal(space["best_first"], np.argsort(-cosines))


@checkpointing
def test_the_verbs_that_take_every_run_take_these(trained, tmp_path, capsys) -> None:
    """`eval` measures what the run reported; `export` and `merge` write what PEFT and transformers
    load."""
    model, folder = trained
    assert main(["eval", str(folder), "--output", str(tmp_path / "numbers.json")]) == 0
    final = evaluated(folder, "final")
    assert f"held-out accuracy {final['accuracy']:.3f}" in capsys.readouterr().out
    assert json.loads((tmp_path / "numbers.json").read_text())["confusion"] == final["confusion"]
    assert main(["export", str(folder), "--output", str(tmp_path / "adapter")]) == 0
    assert (
        main(["merge", str(folder), "--output", str(tmp_path / "merged"), "--dtype", "float32"])
        == 0
    )
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


def test_a_run_lowers_the_loss_and_leaves_its_adapter(chatting) -> None:
    lines = tiny.lines(chatting[1])
    before, after = (evaluated(chatting[1], name) for name in ("initial", "final"))
    assert after["loss"] < 0.7 * before["loss"]
    assert [line["towers"] for line in lines if "towers" in line][-1] == TOWERS
    sample = before["samples"][0]
    assert sample["prompt"].count("[image]") == 1
    assert sample["turns"] == [{"role": "user", "text": f"[image]{QUESTION}"}]
    adapted = load(str(chatting[1]))
    assert {path.split("/")[0] for path, _ in adapted.spec.targets} == set(TOWERS)
    leaves = flatten(adapted.lora)
    assert all(np.abs(leaves[f"{path}/b"]).max() > 0 for path, _ in adapted.spec.targets)


@checkpointing
def test_peft_loads_the_adapter_and_transformers_computes_the_same(chatting, chats) -> None:
    model, folder = chatting
    adapted = load(str(folder), dtype="float32")
    tokenizer, processor = adapted.base.tokenizer, adapted.base.processor
    picture = Image.open(chats.parent / "green0.png").convert("RGB")
    ids = np.array([question_tokens(QUESTION, [(16, 16)], tokenizer, chat=True)], np.int32)
    pixels = processor.normalise(processor(picture)["pixels"][None, None])

    @jax.jit
    def logits(variables, pixels):
        features = adapted.module.apply(variables, pixels, method="encode_images")
        hidden = adapted.module.apply(variables, ids, features=features)
        return adapted.module.apply(variables, hidden, method="unembed")

    ours = np.asarray(logits(adapted.variables, pixels))
    theirs = peft.PeftModel.from_pretrained(
        AutoModel.from_pretrained(model), folder / "adapter"
    ).eval()
    images = torch.tensor(np.asarray(pixels[0]).transpose(0, 3, 1, 2))
    inputs = {"input_ids": torch.tensor(ids, dtype=torch.long), "pixel_values": images}
    inputs["token_type_ids"] = (inputs["input_ids"] == tokenizer.images.token_id).long()
    with torch.no_grad():
        expected = theirs(**inputs).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_the_verbs_see(chatting, chats, tmp_path, capsys) -> None:
    model, folder = chatting
    more = [
        "--prompt",
        QUESTION,
        "--image",
        str(chats.parent / "green0.png"),
        "--max-new-tokens",
        "4",
    ]
    assert main(["generate", str(folder), *more]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["eval", str(folder)]) == 0
    assert f"held-out loss {evaluated(folder, 'final')['loss']:.3f}" in capsys.readouterr().out
    merged = tmp_path / "merged"
    assert main(["merge", str(folder), "--output", str(merged), "--dtype", "float32"]) == 0
    whole, base = (dict(AutoModel.from_pretrained(of).named_parameters()) for of in (merged, model))
    assert whole.keys() == base.keys()
    last = "model.vision_tower.encoder.layers.2.mlp.fc1.weight"
    assert not torch.equal(whole[last], base[last])
    assert main(["export", str(folder), "--output", str(tmp_path / "vllm"), "--for", "vllm"]) == 2
    assert "language model alone" in capsys.readouterr().err


def test_a_conversation_shows_images(vision_folder, chats, monkeypatch, capsys) -> None:
    """Two turns, the second with two images more, as transformers answers them; what is wrong is
    said in between."""
    model, folder = vision_folder("llava"), chats.parent
    typed = f"""/image {folder}/green0.png
{QUESTION}
/image nowhere.png
/image {folder}/green1.png
a <image> ?
/image {folder}/blue0.png
/image {folder}/red1.png
Describe this
"""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    told = ["--max-new-tokens", "4", "--temperature", "0", "--dtype", "float32"]
    assert main(["chat", str(model), *told]) == 0
    out, err = capsys.readouterr()
    said = out.splitlines()
    assert "error: nowhere.png: expected" in err
    assert "green1.png" in err.split("error: ")[2]  # damaged
    assert "error: message: expected no <image> in it" in err

    processor = transformers.AutoProcessor.from_pretrained(model, backend="pil")
    whole = AutoModel.from_pretrained(model).eval()
    turns: list[dict] = []
    form = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    for names, text, answer in (
        ("green0", QUESTION, said[0]),
        ("blue0 red1", "Describe this", said[1]),
    ):
        images = [Image.open(folder / f"{name}.png").convert("RGB") for name in names.split()]
        shown = [{"type": "image", "image": image} for image in images]
        turns.append({"role": "user", "content": [*shown, {"type": "text", "text": text}]})
        inputs = processor.apply_chat_template(turns, **form)
        with torch.no_grad():
            made = whole.generate(**inputs, max_new_tokens=4, do_sample=False)
        length = inputs["input_ids"].shape[1]
        assert processor.decode(made[0, length:], skip_special_tokens=True) == answer
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


def test_settings_that_do_not_fit_are_refused(dual_folder, vision_folder, chats, tmp_path) -> None:
    shots = few_shot(dual_folder("clip"), chats, tmp_path / "run", steps=6, epochs=0.0)
    chatted = chat(vision_folder("llava"), chats, tmp_path / "run")
    for message, settings, changes in (
        (
            "--vision.templates",
            shots,
            {"vision": cfg.VisionConfig("classify", templates=("no name",))},
        ),
        (
            "one of 2 classes",
            shots,
            {"vision": cfg.VisionConfig("classify", classes=("red", "green"))},
        ),
        ("--data.eval-split", shots, {"data": replace(shots.data, eval_split="train[50%:]")}),
        ("--lora.init", shots, {"lora": cfg.LoRAConfig(init="pissa")}),
        ("--compute.quantize", shots, {"compute": cfg.ComputeConfig(quantize="int8")}),
        ("--data.too-long", chatted, {"data": replace(chatted.data, too_long="truncate")}),
        ("green1.png", chatted, {"vision": cfg.VisionConfig("chat", broken="error")}),
        (
            "matches nothing",
            chatted,
            {"vision": cfg.VisionConfig()},
        ),  # its text model has no image tower
    ):
        with pytest.raises(NaloraError, match=message):
            run(replace(settings, **changes))
