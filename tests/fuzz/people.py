"""Readers of what people bring themselves: tables, settings, images, and the configs of models that see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.cli.config_files import load_config
from nalora_jax.data.files import open_rows
from nalora_jax.data.images.files import open_image, read_processor
from nalora_jax.data.tokenizer import read_json
from nalora_jax.models.vision.families import read_dual

ROWS = [{"prompt": f"question {n}", "completion": f" answer {n}", "label": n % 3} for n in range(40)]
SETTINGS = """\
model: smollm2-135m-instruct
steps: 20
lora:
  rules:
    - {pattern: "ffn/(gate|up|down)_proj", rank: 4}
mechanisms: ["soft:power=2.0,warmup=5", curvature_cap]
optimizer: &rates {learning_rate: 1.0e-3, schedule: cosine}
data: {max_length: 128}
"""
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP = {
    "model_type": "clip",
    "projection_dim": 8,
    "logit_scale_init_value": 2.6592,
    "vision_config": {**TOWER, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
    "text_config": {
        **TOWER,
        "model_type": "clip_text_model",
        "vocab_size": 64,
        "max_position_embeddings": 16,
    },
}
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "resample": 3,
    "do_center_crop": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "rescale_factor": 1 / 255,
}


def write_json_array(folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps(ROWS))


def write_csv(folder: Path) -> None:
    lines = [
        "prompt,completion,label",
        *(f'"{row["prompt"]}",{row["completion"]},{row["label"]}' for row in ROWS),
    ]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")


def write_parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=16)


def write_arrow(folder: Path) -> None:
    import pyarrow
    import pyarrow.feather

    pyarrow.feather.write_feather(
        pyarrow.Table.from_pylist(ROWS), folder / "rows.arrow", compression="uncompressed"
    )


def read_rows(folder: Path, name: str) -> None:
    rows = open_rows(folder / name)
    rows.read(range(min(len(rows), 64)))


def write_settings(folder: Path) -> None:
    (folder / "run.yaml").write_text(SETTINGS)


def read_settings(folder: Path) -> None:
    load_config(folder / "run.yaml")


def _picture() -> Any:
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))


def write_png(folder: Path) -> None:
    _picture().save(folder / "image.png")


def write_jpeg(folder: Path) -> None:
    _picture().save(folder / "image.jpg")


def write_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    write_png(folder)


def read_image(folder: Path, name: str) -> None:
    open_image(folder / name)


def use_processor(folder: Path) -> None:
    read_processor(folder).batch([open_image(folder / "image.png")])


def write_clip(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CLIP))


def read_clip(folder: Path) -> None:
    read_dual(read_json(folder / "config.json"), str(folder / "config.json"))
