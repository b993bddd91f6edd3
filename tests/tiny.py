"""A run that takes seconds: a random Llama of two layers whose words are letters, and questions
that it learns.

Used by tests that start whole runs, in this process or in others, and by ``python -m
tests.faults``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import string
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from jax.sharding import Mesh
from tokenizers import decoders, models, pre_tokenizers

from nalora_jax import config as cfg
from nalora_jax.assembly.program import Assembly, assemble
from nalora_jax.common import trees
from nalora_jax.common.downloads import cache_dir
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.loading.adapted import load
from nalora_jax.mesh import distributed, sharding
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import AdapterSpec, resolve
from nalora_jax.weights.merge import write_merged
from nalora_jax.weights.peft_export import export_adapter
from nalora_jax.weights.tokenizer_files import write_tokenizer
from tests import xla_options
from tests.param_trees import init_params

HAS_CPU = importlib.util.find_spec("nalora_jax.cpu") is not None  # it may be deleted
WORDS = ["<end>", "<unk>", *string.ascii_lowercase]
HF = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# A wider model, each of whose key heads serves two query heads.
GROUPED = HF | {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def new_cache(folder: Path) -> str:
    """A folder to be NALORA_CACHE: new, but for the CPU kernels, whose compilation takes half a
    minute."""
    target = folder / "native"
    if HAS_CPU:
        from nalora_jax.cpu.native import library

        if library.kind():
            shutil.copytree(
                cache_dir() / "native", target, ignore=shutil.ignore_patterns("making-*")
            )
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def one_device() -> Mesh:
    """A mesh of the first device."""
    return distributed.make_mesh(cfg.MeshConfig(data=1), jax.devices()[:1])


@contextlib.contextmanager
def on_named_devices(folder: Path) -> Iterator[None]:
    """Runs have the new cache ``folder``, and as many of the simulated devices as their mesh
    names."""
    make = distributed.make_mesh

    def make_mesh(mesh: cfg.MeshConfig, devices: Any = None) -> Mesh:
        # 0 is left to the library
        count = mesh.data * (mesh.fsdp or 1) * (mesh.tensor or 1) * (mesh.context or 1)
        return make(mesh, jax.devices()[:count] if count in (1, 2, 4) else devices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NALORA_CACHE", new_cache(folder))
        patch.setattr(distributed, "make_mesh", make_mesh)
        yield


def word_tokenizer(words: Sequence[str] = WORDS, chat_template: str | None = None) -> Tokenizer:
    """A tokenizer of ``words``, the first of which ends a text."""
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, None, 0, 0, (0,), chat_template)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that most characters beyond ASCII take several; the last, 256, ends a
    text."""
    vocab = {
        character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab | {"<end>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, None, 256, 256, (256,))


def make_model(
    folder: Path,
    hf: Mapping[str, Any] = HF,
    tokenizer: Tokenizer | None = None,
    spread: float = 2.0,
) -> Path:
    """A model as a Hugging Face folder; its weights are ``spread`` times as large as new ones."""
    config = ModelConfig.from_hf(hf)
    params = jax.tree.map(lambda leaf: spread * leaf, init_params(config, jax.random.key(0)))
    written = partial(
        write_tokenizer, tokenizer or word_tokenizer(), max_length=config.max_positions
    )
    options: dict[str, Any] = {"hf_config": hf, "tokenizer": written}
    return write_merged(folder, config, params, None, AdapterSpec(), **options)


@partial(jax.jit, static_argnames="module")
def logits_of(module: Any, variables: Any, tokens: Any) -> jax.Array:
    """Logits of a decoder's whole rows, in one program for all weights and adapters of a shape."""
    logits: jax.Array = module.apply(variables, module.apply(variables, tokens), method="unembed")
    return logits


def make_adapter(
    folder: Path, base: Path, rules: Sequence[cfg.LoRARule], shift: float = 0.2, seed: int = 1
) -> Path:
    """An adapter of a base model's folder in PEFT's files, ``shift`` away from a fresh one."""
    model = load(base, dtype="float32").base
    lora_config = cfg.LoRAConfig(rules=tuple(rules))
    spec = resolve(lora_config, projection_shapes(model.config), model.config.n_layers)
    fresh = init_lora(model.config, spec, jax.random.key(seed))
    lora = jax.device_get(jax.tree.map(lambda leaf: leaf + shift, fresh))
    named = {"base_model_name": str(base), "fingerprint": model.fingerprint}
    export_adapter(lora, spec, model.config, folder, **named)
    return folder


def make_questions(path: Path, count: int = 60) -> Path:
    """Prompts of two letters; the answer is always z."""
    rng = np.random.default_rng(0)
    records = (
        rng.choice(list(string.ascii_lowercase[:-1]), 3, replace=False) for _ in range(count)
    )
    lines = [
        json.dumps({"prompt": f"{a} {b}", "completion": " z", "choices": [str(c), "z"], "gold": 1})
        for a, b, c in records
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def packed_batch(seed: int, rows: int, seq: int, shares: Any = 0.7) -> dict[str, np.ndarray]:
    """Two packed examples and padding in every row ``[rows, seq]``, with ``shares`` of the tokens
    as loss tokens."""
    rng = np.random.default_rng(seed)
    cut, end = rng.integers(2, 7, (rows, 1)), rng.integers(9, seq + 1, (rows, 1))
    place = np.arange(seq)[None, :]
    segments = np.where(place < cut, 1, np.where(place < end, 2, 0)).astype(np.int32)
    weights = (rng.uniform(size=(rows, seq)) < shares) & (segments > 0)
    return {
        "tokens": rng.integers(0, GROUPED["vocab_size"], (rows, seq)).astype(np.int32),
        "targets": rng.integers(0, GROUPED["vocab_size"], (rows, seq)).astype(np.int32),
        "loss_weights": weights.astype(np.float32),
        "segment_ids": segments,
        "positions": np.where(place < cut, place, place - cut).astype(np.int32),
    }


def whole_batch(
    seed: int, shape: tuple[int, ...], share: float = 1.0, vocab: int = 40
) -> dict[str, np.ndarray]:
    """Random rows ``[..., rows, seq]`` without padding, with a share of the tokens as loss
    tokens."""
    rng, ones = np.random.default_rng(seed), np.ones(shape, np.int32)
    tokens, targets = rng.integers(0, vocab, (2, *shape)).astype(np.int32)
    weights = (rng.random(shape) < share).astype(np.float32)
    positions = ones * np.arange(shape[-1], dtype=np.int32)
    names = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
    return dict(zip(names, (tokens, targets, weights, ones, positions), strict=True))


def assembled(
    config: cfg.RunConfig, base: ModelConfig, mesh: cfg.MeshConfig | None = None, **parts: Any
) -> tuple[Assembly, Any]:
    """A run on a mesh (default: one device) and its weights; B of its adapters is not zero.

    A fresh adapter's gradient of A vanishes, and Adam's first step on B is a mere sign.
    """
    mesh, rng = mesh or cfg.MeshConfig(1, 1, 1), np.random.default_rng(3)
    count = mesh.data * mesh.fsdp * mesh.tensor * max(mesh.context, 1)
    made = distributed.make_mesh(mesh, jax.devices()[:count])
    params = init_params(base, jax.random.key(1))
    params = jax.device_put(params, sharding.shardings(params, made, sharding.PARAM_RULES))
    assembly = assemble(config, base, params, made, **parts)

    def moved(path: str, x: jax.Array) -> jax.Array:
        if not path.endswith("/b"):
            return x
        return jax.device_put((rng.normal(size=x.shape) * 0.2).astype(np.float32), x.sharding)

    lora = trees.map_named(moved, assembly.state.lora)
    return replace(assembly, state=assembly.state._replace(lora=lora)), params


def torch_llama() -> Any:
    """A random Llama of two layers as transformers has it, in float32; its logits are not near
    zero."""
    import torch
    import transformers

    settings = HF | {"vocab_size": 40, "intermediate_size": 24, "attn_implementation": "eager"}
    settings |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():  # the defaults leave logits near zero
            parameter.mul_(10.0 if parameter.ndim > 1 else 1.0)
    return model


def make_config(folder: Path, **changes: Any) -> cfg.RunConfig:
    """A run on the model and the questions below ``folder``, which are made if they are missing."""
    model, questions = folder / "model", folder / "questions.jsonl"
    if not model.exists():
        make_model(model)
    if not questions.exists():
        make_questions(questions)
    settings: dict[str, Any] = {
        "model": str(model),
        "output": str(folder / "run"),
        "steps": 6,
        "lora": cfg.LoRAConfig(rules=(cfg.LoRARule("ffn", 4),)),
        "mechanisms": ("soft:power=2,warmup=2", "homogeneity:warmup=2"),
        "optimizer": cfg.OptimizerConfig(learning_rate=2e-2),
        "data": cfg.DataConfig(
            dataset=str(questions),
            train_split="train[:80%]",
            eval_split="train[80%:]",
            max_length=16,
            eval_limit=4,
            select_limit=2,  # with so few, one program measures both
        ),
        "mesh": cfg.MeshConfig(data=1, fsdp=1, tensor=1),
        "train": cfg.TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=2),
        "compute": cfg.ComputeConfig(dtype="float32", compilation_cache=False),
    }
    return cfg.RunConfig(**(settings | changes))


def make_pictures(
    folder: Path,
    colours: Mapping[str, Sequence[int]],
    count: int,
    size: tuple[int, int],
    damaged: str = "",
) -> Path:
    """``count`` noisy PNGs of ``size`` (height, width) of each colour, with captions and labels
    beside them."""
    from PIL import Image

    rng, rows = np.random.default_rng(0), ["file_name,caption,label"]
    for i in range(count):
        for name, colour in colours.items():
            pixels = np.clip(np.asarray(colour) + rng.normal(0, 25, (*size, 3)), 0, 255).astype(
                np.uint8
            )
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")
            rows.append(f"{name}{i}.png,a photo of the {name} square,{name}")
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    if damaged:
        os.truncate(folder / damaged, 50)
    return folder


def write_settings(config: cfg.RunConfig, path: Path) -> Path:
    """``config`` as a file for ``--config``; reports of other processes have no pictures, which
    take seconds."""
    path.write_text(
        "import sys\n\n"
        "from nalora_jax.config import config_from_dict\n"
        "from nalora_jax.report import html\n\n"
        "assert html._draw\n"
        "if 'pytest' not in sys.modules:\n    html._draw = lambda history: []\n\n\n"
        f"def config():\n    return config_from_dict({config.to_dict()!r})\n"
    )
    return path


def start(
    arguments: Sequence[str], *, count: int = 1, devices: int = 1, **variables: str
) -> list[subprocess.Popen]:
    """Starts ``python ARGUMENTS`` as ``count`` processes of one run, each with simulated devices of
    its own."""
    # JAX warns about, and may stall on, proxies in a distributed run's environment.
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    clean |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONUNBUFFERED": "1",
    }
    clean |= {"XLA_FLAGS": xla_options.flags(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    clean |= variables
    if count > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        clean |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    own = [clean | ({"JAX_PROCESS_ID": str(index)} if count > 1 else {}) for index in range(count)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, *arguments], env=variables, **pipes) for variables in own
    ]


def finish(
    processes: Sequence[subprocess.Popen], timeout: float = 600
) -> list[tuple[int, str, str]]:
    """Exit status, standard output and error of each; what does not end in time is killed, which is
    an error."""
    until = time.monotonic() + timeout
    try:
        found = [
            (one, *one.communicate(timeout=max(until - time.monotonic(), 1))) for one in processes
        ]
    finally:
        for one in processes:
            if one.poll() is None:
                one.kill()
                one.communicate()
    return [(one.returncode, out, error) for one, out, error in found]


def wait_for_line(process: subprocess.Popen, text: str) -> str:
    """Reads the process's standard output up to the first line that holds ``text``."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(
        f"the process ended without {text!r}: {process.stderr and process.stderr.read()}"
    )


def lines(folder: Path | str) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def logged(folder: Path | str, name: str = "loss") -> dict[int, float]:
    """A number of every logged step."""
    return {line["step"]: line[name] for line in lines(folder) if name in line}
