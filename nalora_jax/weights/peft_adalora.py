"""Reads PEFT's AdaLoRA adapters as plain LoRA, and its settings as this library's.

A module of such an adapter computes ``x W + s (x A) diag(E) B`` with ``s = lora_alpha / init_r``,
independent of its remaining rank. The conversion multiplies A by E and reduces alpha in proportion
to the rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from nalora_jax.errors import NaloraError, shown

KIND = "ADALORA"  # of peft_type
_OWN = (
    "beta1",
    "beta2",
    "deltaT",
    "init_r",
    "orth_reg_weight",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
)
_EPSILON = 1e-5  # PEFT adds it to init_r in the divisor
_DIAGONAL = re.compile(r"\.lora_E(\.\w+)?$")
# Settings of the allocation: PEFT's name, our name, and PEFT's default.
_SETTINGS = (
    ("target_r", "target_rank", 8),
    ("deltaT", "interval", 1),
    ("beta1", "sensitivity_decay", 0.85),
    ("beta2", "uncertainty_decay", 0.85),
    ("orth_reg_weight", "orthogonality", 0.5),
)
_SHARES = (("tinit", "warmup"), ("tfinal", "final"))  # steps in PEFT, shares of them here


def as_lora_config(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Converts an AdaLoRA ``adapter_config.json`` to the LoRA config for `as_lora_tensors`.

    A module that has lost all its ranks gets rank 1.

    Args:
      raw: the file's fields.
      where: the file, for errors.

    Raises:
      NaloraError: ``init_r``, ``lora_alpha`` or ``rank_pattern`` do not have PEFT's format.
    """
    rank, alpha = raw.get("init_r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise NaloraError(f"{where}: init_r", expected="an integer of 1 or more", found=rank)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e38:
        raise NaloraError(f"{where}: lora_alpha", expected="a number above 0", found=alpha)
    left = raw.get("rank_pattern") or {}
    lists = isinstance(left, Mapping) and all(isinstance(mask, list) for mask in left.values())
    if not lists or not all(len(mask) == rank and set(map(type, mask)) == {bool} for mask in left.values()):
        expected = f"for each module a list of {rank} (init_r) times true or false, as AdaLoRA has it"
        raise NaloraError(f"{where}: rank_pattern", expected=expected, found=str(left)[:200])
    ranks = {re.escape(_DIAGONAL.sub("", name)): max(sum(mask), 1) for name, mask in left.items()}
    alpha_of_rank = float(alpha) * rank / (rank + _EPSILON)
    return {name: value for name, value in raw.items() if name not in _OWN} | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha_of_rank,
        "rank_pattern": ranks,
        "alpha_pattern": {name: alpha_of_rank * mask_rank / rank for name, mask_rank in ranks.items()},
    }


def as_lora_tensors(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Converts AdaLoRA tensors to plain LoRA: ``diag(E) A`` replaces A, and E is dropped.

    Args:
      tensors: by the file's names: ``lora_A [r, d_in]``, ``lora_E [r, 1]``, ``lora_B [d_out, r]``.
      where: the file, for errors.

    Raises:
      NaloraError: a module lacks one of the three, or their shapes do not fit.
    """
    converted = dict(tensors)
    for name in [name for name in tensors if name.endswith(".lora_E")]:
        module = name.removesuffix(".lora_E")
        parts = [converted.pop(f"{module}.lora_{letter}", None) for letter in "EAB"]
        shapes = [getattr(letter, "shape", None) for letter in parts]
        diagonal, a, b = parts
        if diagonal is None or a is None or b is None or not a.ndim == b.ndim == 2:
            expected = "lora_A [r, d_in], lora_E [r, 1] and lora_B [d_out, r]"
            raise NaloraError(f"{where}: {module}", expected=expected, found=f"shapes of E, A, B: {shapes}")
        if diagonal.shape != (a.shape[0], 1) or b.shape[1] != a.shape[0]:
            expected = f"one rank, that of lora_A {a.shape}"
            actual = f"lora_E, lora_B {shapes[0]}, {shapes[2]}"
            raise NaloraError(f"{where}: {module}", expected=expected, found=actual)
        if not len(a):
            a, b = np.zeros((1, a.shape[1]), a.dtype), np.zeros((b.shape[0], 1), b.dtype)
            diagonal = np.ones((1, 1))
        converted[f"{module}.lora_A.weight"] = (a * diagonal).astype(np.float32)
        converted[f"{module}.lora_B.weight"] = b
    return converted


def training_settings(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits an ``AdaLoraConfig`` into fields of a ``LoraConfig`` and this library's settings.

    Any other configuration is returned unchanged.

    Raises:
      NaloraError: ``total_step`` is missing, or ``tinit`` or ``tfinal`` is no number of its steps.
    """
    if values.get("peft_type") != KIND:
        return dict(values), {}
    total = values.get("total_step")
    if not isinstance(total, int) or isinstance(total, bool) or total < 1:
        expected = "the number of steps, which AdaLoRA's schedule spans"
        raise NaloraError("total_step", expected=expected, found=total)
    ours = {name: values.get(theirs, default) for theirs, name, default in _SETTINGS}
    shares = {}
    for theirs, name in _SHARES:
        steps = values.get(theirs) or 0
        if not isinstance(steps, int) or not 0 <= steps <= total:
            raise NaloraError(theirs, expected=f"a number of steps up to {total}", found=shown(steps))
        shares[f"{name}_share"] = steps / total
    plain = {name: value for name, value in values.items() if name not in (*_OWN, "rank_pattern")}
    plain |= {"peft_type": "LORA", "r": values.get("init_r", 12)}
    return plain, {"steps": total, "adalora": ours | shares}
