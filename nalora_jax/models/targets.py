"""Shapes and scales of a model's adapters, resolved from ordered rules.

The layer (`nalora_jax.method.low_rank`) computes ``x W + s (x A) B`` with ``s = alpha / r``, or
``alpha / sqrt(r)`` with rsLoRA. B starts at zero, so a fresh adapter is the identity. AdaLoRA adds
``"singular": [r]``, a diagonal between A and B that starts at zero instead of B.

Sources: LoRA, arXiv 2106.09685; rsLoRA, 2312.03732; AdaLoRA, 2303.10512.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_jax.common.trees import match_rules
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.config import LoRAConfig, LoRARule


# Tables that can be trained entirely, by PEFT's module name: their path in ``params`` and ``lora``.
TOKEN_TABLES = {"embed_tokens": "embed/embedding", "lm_head": "lm_head/kernel"}
# The path of single trained rows of the same tables, ``[rows, d_model]`` in ``lora``; the other
# rows stay frozen.
TOKEN_ROWS = {"embed_tokens": "embed/rows", "lm_head": "lm_head/rows"}


# The path of a classification or reward head in ``lora``, ``[d_model, outputs]``.
SCORE = "score/kernel"


@dataclass(frozen=True)
class TargetSpec:
    """Ranks and alphas of one kind of projection by layer; rank 0 leaves a layer unadapted."""

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    # float32 [layers], scales given by a run in a sweep
    values: Any = field(default=None, compare=False)

    @staticmethod
    def even(rank: int, layers: int) -> TargetSpec:
        """Returns the spec of ``layers`` layers of one rank, with scale 1."""
        return TargetSpec((rank,) * layers, (float(rank),) * layers)

    @property
    def rank(self) -> int:
        """The stored rank; layers of smaller rank are zero-padded to it.

        The padding has no gradient, so it stays zero.
        """
        return max(self.ranks)

    def used(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns which entries of ``[layers, ..., rank]`` are within a layer's rank, as bool."""
        used = np.arange(shape[-1]) < np.array(self.ranks)[:, None]  # [layers, rank]
        return np.broadcast_to(
            used.reshape(len(used), *(1,) * (len(shape) - 2), shape[-1]), shape
        )

    def scales(self, *, rslora: bool) -> Any:
        """Returns ``s`` of each layer: float32 ``[layers]``, 0 without an adapter."""
        if self.values is not None:
            return self.values
        pairs = zip(self.alphas, self.ranks, strict=True)
        return np.array(
            [adapter_scale(alpha, rank, rslora=rslora) for alpha, rank in pairs],
            np.float32,
        )


@dataclass(frozen=True)
class AdapterSpec:
    """Every adapter of a model, by the stacked path of its projection ("layers/ffn/gate_proj")."""

    targets: tuple[tuple[str, TargetSpec], ...] = ()
    rslora: bool = False
    dora: bool = False
    # AdaLoRA: a diagonal between A and B during training; adapter files store plain A and B.
    adalora: bool = False
    dropout: float = 0.0
    # A starts at zero instead of B; the trained adapter does not depend on it in any other way.
    zero_a: bool = field(default=False, compare=False)
    # Names in `TOKEN_TABLES` that are trained entirely (PEFT's modules_to_save).
    saved: tuple[str, ...] = ()
    # By table in `TOKEN_ROWS`: token ids whose rows are trained (PEFT's trainable_token_indices),
    # in the order of the rows.
    token_indices: tuple[tuple[str, tuple[int, ...]], ...] = ()
    # Weights of the base that are trained themselves (`nalora_jax.method.tuned`): path in
    # ``params``, and the selected layers of its stack, () for a weight that is trained whole.
    tuned: tuple[tuple[str, tuple[bool, ...]], ...] = ()
    # Outputs of a trained head on one vector of each text, at `SCORE` in ``lora``; 0: no head.
    score: int = 0

    @property
    def tuned_layers(self) -> dict[str, np.ndarray]:
        """Returns the masks of stacked weights of which some layers are trained."""
        return {path: np.array(layers) for path, layers in self.tuned if layers}

    def own_rows(self, *, tied: bool) -> dict[str, tuple[int, ...]]:
        """Returns the tables that have separate trained rows, with the token ids of the rows.

        As in PEFT, a tied head that is listed with exactly the embedding's ids shares the
        embedding's rows.
        """
        rows = dict(self.token_indices)
        if tied and rows.get("lm_head") == rows.get("embed_tokens"):
            rows.pop("lm_head", None)
        return rows

    def head_rows(self, *, tied: bool) -> tuple[str, tuple[int, ...]] | None:
        """Returns the table whose trained rows the output head uses, and their ids, or None."""
        rows = self.own_rows(tied=tied)
        if "lm_head" in rows:
            return "lm_head", rows["lm_head"]
        if tied and "embed_tokens" in rows:
            return ("embed_tokens", rows["embed_tokens"])
        return None

    def describe(self) -> str:
        """Returns a summary of the trained arrays, e.g. ``ffn/gate_proj (8), ffn/up_proj (8)``."""
        names = [
            f"{uniform_path(path).replace('layers/', '', 1)} ({spec.rank})"
            for path, spec in self.targets
        ]
        names = list(dict.fromkeys(names))
        names += [f"{len(ids)} rows of {name}" for name, ids in self.token_indices]
        if self.tuned:
            names.append(f"{len(self.tuned)} arrays of the model")
        if self.score:
            names.append(f"a head of {self.score} outputs")
        return ", ".join(names) or "projections alone"

    def target(self, path: str) -> TargetSpec | None:
        """Returns the spec of ``path``, or None if the projection is not adapted."""
        return dict(self.targets).get(path)

    def scales(self, path: str) -> Any:
        """Returns ``s`` of each layer at ``path``: float32 ``[layers]``, 0 without an adapter."""
        return dict(self.targets)[path].scales(rslora=self.rslora)


def adapter_scale(alpha: float, rank: int, *, rslora: bool = False) -> float:
    """Returns ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA; 0 for rank 0."""
    if rank == 0:
        return 0.0
    return alpha / scale_divisor(rank, rslora=rslora)


def scale_divisor(rank: float, *, rslora: bool) -> float:
    """Returns the divisor of alpha in an adapter's scale: the rank, or its square root with
    rsLoRA."""
    if rslora:
        return math.sqrt(rank)
    return rank


def _checked_alpha(
    rule: LoRARule, path: str, shape: tuple[int, ...], config: LoRAConfig
) -> float:
    """Returns a rule's alpha, after checking its rank and alpha on a projection."""
    limit = min(shape[-2:])
    side = "the smaller side"
    if config.init == "lora_ga":
        limit = limit // 2
        side = (
            "half the smaller side, for LoRA-GA takes twice as many singular vectors,"
        )
    where = f"--lora.rules {rule.pattern!r}"
    if not 0 <= rule.rank <= limit:
        expected = f"0 to {limit} ({side} of {path} {shape})"
        raise NaloraError(f"{where}: rank", expected=expected, found=rule.rank)
    alpha = rule.alpha
    if alpha is None:
        alpha = 2.0 * rule.rank
    if rule.rank and not (math.isfinite(alpha) and alpha > 0):
        raise NaloraError(
            f"{where}: alpha", expected="a number above 0", found=rule.alpha
        )
    return alpha


def resolve(
    config: LoRAConfig,
    shapes: Mapping[str, tuple[int, ...]],
    numbers: int | Mapping[str, Sequence[int]],
) -> AdapterSpec:
    """Returns the adapters that the rules of ``config`` select on a model.

    Args:
      config: ordered rules and the variant.
      shapes: kernel shape ``(..., d_in, d_out)`` of every projection that can be adapted, by
        stacked path, e.g. ``{"layers/ffn/gate_proj": (576, 1536)}``. Rules are searched in
        ``layers/<i>/ffn/gate_proj``.
      numbers: the layers of every path, e.g. ``{"layers/ffn/gate_proj": range(30)}``; or the number
        of layers, if all paths have the same.

    Raises:
      NaloraError: a rule has no match, a rank is negative or larger than the projection, or an
        alpha is not positive.
    """
    if isinstance(numbers, int):
        numbers = dict.fromkeys(shapes, range(numbers))
    # Path of each layer's projection -> its stacked path and its index in the stack.
    names = {
        layer_path(path, number): (path, i)
        for path in shapes
        for i, number in enumerate(numbers[path])
    }
    matched = match_rules(
        [(rule.pattern, rule) for rule in config.rules], names, where="--lora.rules"
    )
    specs: dict[str, tuple[list[int], list[float]]] = {}
    for name, rule in matched.items():
        path, layer = names[name]
        alpha = _checked_alpha(rule, path, shapes[path], config)
        # Layers without a matching rule keep rank 0, whose alpha has no effect.
        ranks, alphas = specs.setdefault(
            path, ([0] * len(numbers[path]), [1.0] * len(numbers[path]))
        )
        ranks[layer], alphas[layer] = rule.rank, float(alpha or 1.0)
    targets = tuple(
        (path, TargetSpec(tuple(r), tuple(a)))
        for path, (r, a) in sorted(specs.items())
        if max(r) > 0
    )
    if not targets:
        actual = "rank 0 everywhere"
        remedy = "give a rule a rank of 1 or more"
        raise NaloraError(
            "--lora.rules", expected="at least one adapter", found=actual, remedy=remedy
        )
    saved = tuple(name for name in TOKEN_TABLES if name in config.modules_to_save)
    ids = config.trainable_token_indices
    rows = tuple(
        (name, ids)
        for name in TOKEN_ROWS
        if ids and name in config.trainable_token_modules
    )
    variant: dict[str, Any] = {
        "rslora": config.rslora,
        "dora": config.dora,
        "dropout": config.dropout,
    }
    return AdapterSpec(targets, **variant, saved=saved, token_indices=rows)


# ---------------------------------------------------------------- paths

_STACK = re.compile(r"(?<=layers/)group\d+/block\d+/")
_EXACT = "router/correction"  # rounding it would choose other experts


def leaf_dtype(path: str, dtype: Any) -> Any:
    """Returns the dtype in which a model of ``dtype`` holds an array."""
    if path.endswith(_EXACT):
        return "float32"
    return dtype


def uniform_path(path: str) -> str:
    """Returns a path without the names of group and block.

    Example: ``layers/group0/block1/ffn/gate_proj`` -> ``layers/ffn/gate_proj``.
    """
    return _STACK.sub("", path)


def layer_path(path: str, number: int) -> str:
    """Returns the path of one layer's array, which rules are searched in.

    Example: ``layers/group0/block1/ffn/gate_proj`` of layer 5 -> ``layers/5/ffn/gate_proj``; a
    prefix before ``layers`` is kept.
    """
    head, _, tail = uniform_path(path).partition("layers/")
    return f"{head}layers/{number}/{tail}"
