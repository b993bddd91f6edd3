"""PEFT's low-rank adapters on the token embedding and the head, read as full trained tables.

    model.embed_tokens.lora_embedding_A [r, vocab]  lora_embedding_B [d_model, r]  W + s (B A).T
    lm_head.lora_A.weight [r, d_model]              lora_B.weight [vocab, r]       W + s B A

PEFT writes the base's table W (``base_layer.weight``) next to such an adapter. The sum is a table
of ``modules_to_save`` (`nalora_jax.weights.saved_modules`): the same function, in float32.
"""

from __future__ import annotations

import numpy as np

from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.targets import adapter_scale
from nalora_jax.weights.peft_config import PeftConfig
from nalora_jax.weights.saved_modules import tensor_names

_KINDS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
_BASE = "base_layer.weight"


def fold_table_adapters(
    config: ModelConfig, tensors: dict[str, np.ndarray], peft: PeftConfig, where: str
) -> None:
    """Replaces adapters on the embedding and the head by the resulting tables.

    Args:
      config: the base model.
      tensors: by PEFT's key; entries of such adapters are removed, and tables are added under the
        key of a trained table.
      peft: ``adapter_config.json``.
      where: the tensor file, for error messages.

    Raises:
      NaloraError: an adapter lacks its base's table, has the wrong shape, uses DoRA, or is not
        covered by the config.
    """
    modules = [name.removesuffix(".weight") for name in tensor_names(config).values()]
    choices = peft.choose(modules)
    for module in modules:
        key = f"base_model.model.{module}"
        names = [f"{key}.{kind}" for kind in _KINDS if f"{key}.{kind}" in tensors]
        if not names:
            continue
        if module not in choices.modules:
            expected = f"to cover {module}, which has tensors in {where.rpartition('/')[2]}"
            actual = str(peft.target_modules)[:200]
            raise NaloraError(f"{peft.where}: target_modules", expected=expected, found=actual)
        if peft.dora:
            raise NaloraError(
                f"{peft.where}: use_dora", expected=f"false with adapters on {module}", found="true"
            )
        if f"{key}.{_BASE}" not in tensors:
            raise NaloraError(
                f"{where}: {key}.{_BASE}",
                expected=f"the base's table, to which the adapter on {module} is added",
                found="nothing",
                remedy="save the adapter with PEFT's save_pretrained(folder, save_embedding_layers=True)",
            )
        a, b, base = (tensors.pop(name) for name in (*_pair(names, key, where), f"{key}.{_BASE}"))
        scale = adapter_scale(choices.alphas[module], choices.ranks[module], rslora=peft.rslora)
        flipped = names[0].endswith("lora_embedding_A")
        _check_shapes(a, b, base, choices.ranks[module], flipped=flipped, where=f"{where}: {key}")
        product = b @ a
        if flipped:
            product = product.T
        tensors[f"{key}.weight"] = base + np.float32(scale) * product


def _pair(names: list[str], key: str, where: str) -> list[str]:
    if len(names) != 2:
        present = ", ".join(names)
        raise NaloraError(f"{where}: {key}", expected="both factors of an adapter", found=present)
    return names


def _check_shapes(
    a: np.ndarray, b: np.ndarray, base: np.ndarray, rank: int, *, flipped: bool, where: str
) -> None:
    outputs, inputs = base.shape[::-1] if flipped else base.shape
    if (a.shape, b.shape) != ((rank, inputs), (outputs, rank)):
        expected = f"factors of shapes {(rank, inputs)} and {(outputs, rank)}"
        raise NaloraError(where, expected=expected, found=f"{a.shape} and {b.shape}")
