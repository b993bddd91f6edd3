"""Refusals of the functions of a run: a call, and a part of its message."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest

from nalora_jax.assembly import program
from nalora_jax.cli.training import run
from nalora_jax.config import (
    DataConfig,
    LoRAConfig,
    MeshConfig,
    PreferenceConfig,
    RunConfig,
    VisionConfig,
)
from nalora_jax.data.images.opened import ImageSource
from nalora_jax.data.source import RecordsSource
from nalora_jax.kinds import dual, images, preference, text
from nalora_jax.kinds.rl import kind
from nalora_jax.models.config import ModelConfig
from nalora_jax.train import output
from nalora_jax.train.callbacks import make_callbacks
from nalora_jax.train.checkpoint import Checkpointer
from nalora_jax.train.log import MetricsLog
from nalora_jax.train.profile import Profile
from tests import tiny
from tests.refused import Call, table_test

TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def save_below_a_file(_: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "run").write_text("")
    Checkpointer(folder / "run" / "checkpoints", fingerprint="sha256:aa", config={})


def log_twice(_: pytest.MonkeyPatch, folder: Path) -> None:
    for _ in range(2):
        with MetricsLog(folder) as metrics:
            metrics.start({"steps": 1}, versions={}, device="cpu")


def trace_twice(_: pytest.MonkeyPatch, folder: Path) -> None:
    state = jnp.zeros(3)
    with (
        Profile(range(1, 3), folder / "a") as first,
        first.step(1, state),
        Profile(range(1, 3), folder / "b") as second,
        second.step(1, state),
    ):
        pass


def share_a_bucket_that_is_not_mounted(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(output.jax, "process_count", lambda: 2)
    with output.open_output("s3://bucket/run", False):
        pass


def share_a_local_folder(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(output, "_SEEN_WITHIN", 0)
    patch.setattr(output.multihost_utils, "process_allgather", lambda _: np.array([1, 0]))
    output.check_shared(folder)


def open_a_forbidden_bucket(patch: pytest.MonkeyPatch, _: Path) -> None:
    def forbid(_: str) -> None:
        raise PermissionError("403 Forbidden\nrequest 17")

    patch.setattr(output, "epath", SimpleNamespace(Path=forbid))
    output.store_folder("s3://bucket/run")


def start_vision_from_a_subspace(_: pytest.MonkeyPatch, __: Path) -> None:
    model = {"model_type": "llava", "text_config": tiny.HF, "vision_config": TOWER}
    base = ModelConfig.from_hf(model | {"image_token_index": 4}, images=True)
    config = RunConfig(lora=LoRAConfig(init="pissa"))
    program.check_decoder(config, base, tiny.one_device())


def export_another_adapter(patch: pytest.MonkeyPatch, folder: Path) -> None:
    job = SimpleNamespace(
        config=RunConfig(),
        loaded=None,
        assembly=SimpleNamespace(initial=None),
        data=SimpleNamespace(batches=lambda: None),
    )
    patch.setattr(text, "exportable_adapter", lambda *_: ({}, None))
    patch.setattr(text, "write_adapter", lambda *_, **__: None)
    patch.setattr(text, "_difference", lambda *_: 0.5)
    state = SimpleNamespace(lora={})
    text.export_run(cast(Any, job), folder, cast(Any, state), lambda _: None)


def prefer_an_answer_beyond_the_context(_: pytest.MonkeyPatch, folder: Path) -> None:
    model = tiny.make_model(folder / "model")
    long = {"prompt": "a", "chosen": " b" * 70, "rejected": " c"}
    config = RunConfig(
        model=str(model),
        preference=PreferenceConfig("dpo"),
        data=DataConfig(max_length=120),
        mesh=MeshConfig(data=1),
    )
    pairs = RecordsSource("pairs", [long] * 64)
    preference.open_inputs(config, {"train": pairs, "validation": pairs})


def score_without_a_reward(_: pytest.MonkeyPatch, __: Path) -> None:
    evaluator = object.__new__(kind.RewardEvaluator)
    evaluator.summary([{"reward": float("nan")}])


def hold_out_one_image(_: pytest.MonkeyPatch, folder: Path) -> None:
    tiny.make_pictures(folder, {"red": (220, 30, 30)}, count=1, size=(16, 16))
    records = RecordsSource("pictures", [{"image": folder / "red0.png"}])
    dual.draw_images(ImageSource(records, VisionConfig(image_field="image")), 0)


def read_patches_of_another_size(_: pytest.MonkeyPatch, __: Path) -> None:
    image = SimpleNamespace(any_shape=True, patch_size=4)
    loaded = SimpleNamespace(
        config=SimpleNamespace(image=image), processor=SimpleNamespace(patch_size=8)
    )
    source = ImageSource(RecordsSource("pictures", [{}]), VisionConfig())
    records = dual.ImageRecords(source, np.arange(1), ("red",), np.zeros(1, np.int32))
    dual.image_data(RunConfig(), cast(Any, loaded), records, tiny.one_device())


REFUSALS: dict[str, tuple[Call, str]] = {
    "a password that the log left out": (
        lambda *_: make_callbacks(["wandb:key=***"]),
        r"--callbacks: expected the callback with its password, found wandb:key=\*\*\*; name",
    ),
    "checkpoints below a file": (
        save_below_a_file,
        "checkpoints .*run/checkpoints: expected a folder that can be written, found Not a dir",
    ),
    "the log of another run": (
        log_twice,
        "metrics.jsonl: expected a new run's folder, found the log of another run",
    ),
    "two traces": (
        trace_twice,
        "--debug.profile: expected a profiler that is free, found .*stop the other trace",
    ),
    "an unmounted bucket for two processes": (
        share_a_bucket_that_is_not_mounted,
        "--output: expected a folder of a file system or gs://..., with 2 processes, found s3://",
    ),
    "a folder that one process does not see": (
        share_a_local_folder,
        "expected a folder that all 2 processes share, found one that process 1 does not see",
    ),
    "a forbidden bucket": (
        open_a_forbidden_bucket,
        "--output s3://bucket/run: expected a folder that can be read, found 403 Forbidden; check",
    ),
    "a subspace of a vision-language model": (
        start_vision_from_a_subspace,
        "--lora.init: expected default for a vision-language model, found pissa",
    ),
    "an export that differs": (
        export_another_adapter,
        "expected the trained adapter's logits, found a difference of 5.0e-01",
    ),
    "a sweep's mesh without a sweep": (
        lambda *_: run(RunConfig(mesh=MeshConfig(run=2))),
        "--mesh.run: expected 0 or 1 without --sweep, found 2",
    ),
    "an answer beyond the context": (
        prefer_an_answer_beyond_the_context,
        "training data: expected answers with their prompts of at most 64 tokens.*found one of 7",
    ),
    "no reward at all": (
        score_without_a_reward,
        "held-out prompts: expected a reward of at least one, found none",
    ),
    "one held-out image": (
        hold_out_one_image,
        "--data.eval-split: expected at least two images, found 1",
    ),
    "patches of another size": (
        read_patches_of_another_size,
        "preprocessor_config.json: patch_size: expected 4, found 8",
    ),
    "images for a language model": (
        lambda *_: images.vision_sources(DataConfig(), VisionConfig(task="chat"), None),
        "--model: expected a vision-language model, found a language model",
    ),
    "conversations without their split": (
        lambda *_: images.vision_sources(
            DataConfig(train_split="train"),
            VisionConfig(task="chat"),
            cast(Any, SimpleNamespace()),
            {"test": RecordsSource("chats", [{}])},
        ),
        "source: expected a split 'train', found test",
    ),
}

test_it_is_refused = table_test(REFUSALS)
