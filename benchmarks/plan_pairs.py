"""Random pairs of a model and a machine, drawn by a seed, for `benchmarks/plan_accuracy.py`."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nalora_jax.config import DataConfig, RunConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import param_shapes
from nalora_jax.planner.layouts import fitting_layouts
from nalora_jax.planner.machines import topology

# As published in the models' repositories: width, FFN, layers, heads, KV heads, head size,
# vocabulary, tied.
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
_SIZES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "qwen2.5-0.5b": ("qwen2", (896, 4864, 24, 14, 2, 64, 151936, True)),
    "qwen2.5-1.5b": ("qwen2", (1536, 8960, 28, 12, 2, 128, 151936, True)),
    "qwen2.5-7b": ("qwen2", (3584, 18944, 28, 28, 4, 128, 152064, False)),
    "qwen2.5-32b": ("qwen2", (5120, 27648, 64, 40, 8, 128, 152064, False)),
    "qwen3-1.7b": ("qwen3", (2048, 6144, 28, 16, 8, 128, 151936, True)),
    "qwen3-4b": ("qwen3", (2560, 9728, 36, 32, 8, 128, 151936, True)),
    "qwen3-14b": ("qwen3", (5120, 17408, 40, 40, 8, 128, 151936, False)),
    "llama-3.2-1b": ("llama", (2048, 8192, 16, 32, 8, 64, 128256, True)),
    "llama-3.2-3b": ("llama", (3072, 8192, 28, 24, 8, 128, 128256, True)),
    "llama-3.1-8b": ("llama", (4096, 14336, 32, 32, 8, 128, 128256, False)),
    "llama-3.1-70b": ("llama", (8192, 28672, 80, 64, 8, 128, 128256, False)),
    "llama-2-13b": ("llama", (5120, 13824, 40, 40, 40, 128, 32000, False)),
    "smollm2-1.7b": ("llama", (2048, 8192, 24, 32, 32, 64, 49152, True)),
    "mistral-7b": ("llama", (4096, 14336, 32, 32, 8, 128, 32768, False)),
    "mistral-small-24b": ("llama", (5120, 32768, 40, 32, 8, 128, 131072, False)),
    "olmo-2-7b": ("olmo2", (4096, 11008, 32, 32, 32, 128, 100352, False)),
    "gemma-2-2b": ("gemma2", (2304, 9216, 26, 8, 4, 256, 256000, True)),
    "gemma-2-9b": ("gemma2", (3584, 14336, 42, 16, 8, 256, 256000, True)),
    "gemma-3-4b": ("gemma3_text", (2560, 10240, 34, 8, 4, 256, 262208, True)),
    "gemma-3-27b": ("gemma3_text", (5376, 21504, 62, 32, 16, 128, 262208, True)),
    "qwen3-30b-a3b": ("qwen3_moe", (2048, 6144, 48, 32, 4, 128, 151936, False)),
    "mixtral-8x7b": ("mixtral", (4096, 14336, 32, 32, 8, 128, 32000, False)),
}
_MORE: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "gemma-2-9b": {"query_pre_attn_scalar": 256},
    "gemma-3-27b": {"query_pre_attn_scalar": 168, "sliding_window": 1024},
    "gemma-3-4b": {"sliding_window": 1024},
}
_ACTIVATIONS = {"gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh"}
_OF_EXPERTS, _MIXTURES = ("mixtral", "qwen3_moe"), 0.2  # and their share
_DEPTHS = (0.5, 0.75, 1.0, 1.4)  # of the published number of layers
_MACHINES = (
    *("v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:16x16", "2xv5e:4x4"),
    *("v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:16x16", "2xv6e:4x4"),
    *("v5p:2x2x2", "v5p:2x2x4", "v5p:4x4x4", "2xv5p:2x2x2"),
    *("8xh100", "16xh100"),
)
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_TOKENS = (2048, 65536)  # per chip, of all rows of a step
_PARAMETERS = (0.4e9, 75e9)


@dataclass(frozen=True)
class Pair:
    """A run on a machine."""

    model: str
    layers: int
    machine: str
    rows: int  # of a step, on all chips
    seq: int

    def __str__(self) -> str:
        return f"{self.model}, {self.layers} layers, {self.machine}, {self.rows} x {self.seq}"

    @property
    def base(self) -> ModelConfig:
        """Returns the architecture."""
        family, sizes = _SIZES[self.model]
        raw = (
            {"model_type": family}
            | dict(zip(_FIELDS, sizes, strict=True))
            | _MORE.get(self.model, {})
        )
        raw |= {
            "num_hidden_layers": self.layers,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
        }
        raw |= (
            {"sliding_window": None}
            if family in ("mixtral", "qwen2", "qwen3", "qwen3_moe")
            else {}
        )
        activation = _ACTIVATIONS.get(family)
        return ModelConfig.from_hf(
            raw | ({"hidden_activation": activation} if activation else {})
        )

    @property
    def config(self) -> RunConfig:
        """Returns the run, with the paper's two mechanisms, as in `benchmarks/pods.py`."""
        train, data = TrainConfig(batch_size=self.rows), DataConfig(max_length=self.seq)
        return RunConfig(
            train=train, data=data, mechanisms=("soft:power=2", "homogeneity")
        )


# Pairs for which earlier estimates accepted a layout that did not fit.
KNOWN = (
    Pair("qwen3-30b-a3b", 48, "2xv6e:4x4", 32, 4096),
    Pair("qwen3-14b", 56, "v5e:4x8", 32, 4096),
)


def drawn(seed: int) -> Iterator[Pair]:
    """Yields pairs without end; a pair is left out if no layout is estimated to fit."""
    random_ = random.Random(seed)
    while True:
        pair = _draw(random_)
        if pair is not None and _fits(pair):
            yield pair


def _draw(random_: random.Random) -> Pair | None:
    """Returns a pair, or None if its model or its rows are out of range."""
    mixture = random_.random() < _MIXTURES
    models = sorted(
        name
        for name, (family, _) in _SIZES.items()
        if (family in _OF_EXPERTS) == mixture
    )
    model, machine = random_.choice(models), random_.choice(_MACHINES)
    layers = round(_SIZES[model][1][2] * random_.choice(_DEPTHS))
    seq, rows_a_chip = (
        random_.choice(_LENGTHS),
        random_.choice((0.25, 0.5, 1, 2, 4, 8, 16)),
    )
    rows = rows_a_chip * topology(machine).size
    pair = Pair(model, layers, machine, int(rows), seq)
    tokens, low, high = rows_a_chip * seq, *_PARAMETERS
    if (
        rows < 1
        or not _TOKENS[0] <= tokens <= _TOKENS[1]
        or not low <= _parameters(pair.base) <= high
    ):
        return None
    return pair


def _parameters(base: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in param_shapes(base).values())


def _fits(pair: Pair) -> bool:
    """Returns True if a layout is estimated to fit."""
    try:
        fitting_layouts(pair.config, pair.base, topology(pair.machine))
    except NaloraError:
        return False
    return True
