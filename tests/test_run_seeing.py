"""Whole runs on conversations about images: from a file of chats to an adapter that PEFT reads, and what uses it."""

from __future__ import annotations

import io
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
from nalora_jax.data.images.chat import asked
from nalora_jax.errors import NaloraError
from nalora_jax.train.adapted import load
from tests import seeing, tiny
from tests.seeing import QUESTION

torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
TOWERS = {"image": 3, "layers": 2}
AutoModel = transformers.AutoModelForImageTextToText


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations, one of whose images is damaged."""
    return seeing.make_chats(tmp_path_factory.mktemp("chats"), damaged="green1.png")


def settings(model: Path, chats: Path, output: Path, **changes: Any) -> cfg.RunConfig:
    """`configs/llava_chat.py` on a tiny model and a file."""
    base = load_config("configs/llava_chat.py")
    splits = {"train_split": "train[:75%]", "eval_split": "train[75%:]", "eval_limit": 4, "select_limit": 2}
    own: dict[str, Any] = {
        "model": str(model),
        "output": str(output),
        "steps": 8,
        "lora": cfg.LoRAConfig(rules=(cfg.LoRARule("image/.*ffn", 2), cfg.LoRARule("", 8))),
        "data": cfg.DataConfig(str(chats), max_length=96, chat=True, workers=1, **splits),
        "train": cfg.TrainConfig(batch_size=8, log_every=4, eval_every=0, save_every=8),
        "compute": cfg.ComputeConfig("float32", stats_stride=1, compilation_cache=False),
        "mesh": cfg.MeshConfig(data=2, fsdp=2, tensor=2),
        "optimizer": replace(base.optimizer, learning_rate=5e-2),
    }
    return replace(base, **(own | changes))


@pytest.fixture(scope="module")
def trained(seeing_folder, chats, tmp_path_factory) -> tuple[Path, Path]:
    """A model's folder, and that of a finished run on it."""
    model, folder = seeing_folder("gemma3"), tmp_path_factory.mktemp("runs") / "run"
    run(settings(model, chats, folder))
    return model, folder


def test_a_run_lowers_the_loss_and_leaves_its_adapter(trained) -> None:
    lines = tiny.lines(trained[1])
    before, after = (next(line["eval"] for line in lines if name in line) for name in ("initial", "final"))
    assert after["loss"] < 0.7 * before["loss"]
    assert [line["towers"] for line in lines if "towers" in line][-1] == TOWERS
    sample = before["samples"][0]
    assert sample["prompt"].count("[image]") == 1
    assert sample["turns"] == [{"role": "user", "text": f"[image]{QUESTION}"}]
    adapted = load(str(trained[1]))
    assert {path.split("/")[0] for path, _ in adapted.spec.targets} == set(TOWERS)
    leaves = flatten(adapted.lora)
    assert all(np.abs(leaves[f"{path}/b"]).max() > 0 for path, _ in adapted.spec.targets)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_loads_the_adapter_and_transformers_sees_the_same(trained, chats) -> None:
    model, folder = trained
    adapted = load(str(folder), dtype="float32")
    tokenizer, processor = adapted.base.tokenizer, adapted.base.processor
    picture = Image.open(chats.parent / "green0.png").convert("RGB")
    ids = np.array([asked(QUESTION, 1, tokenizer, chat=True)], np.int32)
    pixels = processor.normalise(processor(picture)["pixels"][None, None])

    @jax.jit
    def logits(variables, pixels):
        seen = adapted.module.apply(variables, pixels, method="see")
        hidden = adapted.module.apply(variables, ids, features=seen)
        return adapted.module.apply(variables, hidden, method="unembed")

    ours = np.asarray(logits(adapted.variables, pixels))
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(model), folder / "adapter").eval()
    seen = torch.tensor(np.asarray(pixels[0]).transpose(0, 3, 1, 2))
    inputs = {"input_ids": torch.tensor(ids, dtype=torch.long), "pixel_values": seen}
    inputs["token_type_ids"] = (inputs["input_ids"] == tokenizer.images.token_id).long()
    with torch.no_grad():
        expected = theirs(**inputs).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_the_verbs_see(trained, chats, tmp_path, capsys) -> None:
    model, folder = trained
    more = ["--prompt", QUESTION, "--image", str(chats.parent / "green0.png"), "--max-new-tokens", "4"]
    assert main(["generate", str(folder), *more]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["eval", str(folder)]) == 0
    final = next(line["eval"] for line in tiny.lines(folder) if "final" in line)
    assert f"held-out loss {final['loss']:.3f}" in capsys.readouterr().out
    merged = tmp_path / "merged"
    assert main(["merge", str(folder), "--output", str(merged), "--dtype", "float32"]) == 0
    whole, base = (dict(AutoModel.from_pretrained(of).named_parameters()) for of in (merged, model))
    assert whole.keys() == base.keys()
    last = "model.vision_tower.encoder.layers.2.mlp.fc1.weight"
    assert not torch.equal(whole[last], base[last])
    assert main(["export", str(folder), "--output", str(tmp_path / "vllm"), "--for", "vllm"]) == 2
    assert "language model alone" in capsys.readouterr().err


def test_a_conversation_shows_images(seeing_folder, chats, monkeypatch, capsys) -> None:
    """Two turns, the second with two images more, as transformers answers them; what is wrong is said in between."""
    model, folder = seeing_folder("llava"), chats.parent
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
    form = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for names, text, answer in (("green0", QUESTION, said[0]), ("blue0 red1", "Describe this", said[1])):
        images = [Image.open(folder / f"{name}.png").convert("RGB") for name in names.split()]
        shown = [{"type": "image", "image": image} for image in images]
        turns.append({"role": "user", "content": [*shown, {"type": "text", "text": text}]})
        inputs = processor.apply_chat_template(turns, **form)
        with torch.no_grad():
            made = whole.generate(**inputs, max_new_tokens=4, do_sample=False)
        length = inputs["input_ids"].shape[1]
        assert processor.decode(made[0, length:], skip_special_tokens=True) == answer
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


def test_settings_that_do_not_fit_are_refused(seeing_folder, chats, tmp_path) -> None:
    base = settings(seeing_folder("llava"), chats, tmp_path / "run")
    for message, changes in {
        "--data.too-long": {"data": replace(base.data, too_long="truncate")},
        "green1.png": {"vision": cfg.VisionConfig("chat", broken="error")},
        "matches nothing": {"vision": cfg.VisionConfig()},  # its text model has no image tower
    }.items():
        with pytest.raises(NaloraError, match=message):
            run(replace(base, **changes))
