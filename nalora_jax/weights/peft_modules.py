"""Maps projections to modules of transformers, family by family, for PEFT adapters.

Most families have one Linear module per projection. Phi-3 fuses q, k, v and gate, up into one
module each. Mixtures of experts store all experts of a layer in two parameters (transformers 5:
PEFT's ``target_parameters``), or one Linear module per expert and projection (transformers 4, and
the format that vLLM reads).

An adapter of a fused module is exact: with parts of rank r1, r2, ... it has rank r1 + r2 + ...::

    A = [A1; A2]           [r1 + r2, d_in]       (torch layout)
    B = [[B1, 0], [0, B2]] [d_out1 + d_out2, r1 + r2]

Parts with the same A (an adapter that PEFT trained on the fused module) need it once::

    A = A1                 [r, d_in]
    B = [B1; B2]           [d_out1 + d_out2, r]
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nalora_jax.models.adapters import pad_rank
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.family import contains_text_model, family_of
from nalora_jax.models.stacks import projection_shapes, stacked_places
from nalora_jax.models.targets import scale_divisor
from nalora_jax.weights.keymaps import OF_ENCODERS, RENAMED_PARTS

if TYPE_CHECKING:
    from nalora_jax.models.vision.vision_config import DualConfig

    Host = ModelConfig | DualConfig

# A Linear module, one expert's Linear module, or the parameter of all experts of a layer.
PeftForm = Literal["linear", "expert", "stack"]


@dataclass(frozen=True)
class HostModule:
    """A module (or parameter) in all layers that have it, and the projections whose outputs it
    concatenates."""

    name: str  # "model.layers.{layer}.mlp.gate_up_proj"; one expert's "....experts.{expert}.w1"
    # uniform paths: ("layers/ffn/gate_proj", "layers/ffn/up_proj")
    parts: tuple[str, ...]
    form: PeftForm = "linear"
    # the parts' outputs alternate instead of following each other
    alternates: bool = False

    @property
    def short(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def in_layer(self) -> str:
        """The name without a decoder's layer: ``mlp.gate_up_proj``."""
        if self.parts[0].startswith("layers/"):
            return self.name.partition("{layer}.")[2]
        return self.name


# Stacks are last, in the order in which they are registered.
ModuleLayout = tuple[HostModule, ...]

_TEXT = "model.layers."
_TEXT_PART = "model.language_model.layers."  # in multimodal models
# The names of modules in transformers' AutoModel, which has no output head.
_WITHOUT_HEAD = {"model.": ""}
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def modules_of_form(layout: ModuleLayout, *forms: PeftForm) -> ModuleLayout:
    """Returns the modules of these forms."""
    return tuple(module for module in layout if module.form in forms)


def module_layout(config: Host) -> ModuleLayout:
    """Returns the modules whose weights are in a family's checkpoints.

    Example: the row ``model.layers.{layer}.mlp.gate_up_proj.weight`` of Phi-3's table is the
    module ``model.layers.{layer}.mlp.gate_up_proj`` of ``layers/ffn/gate_proj`` and
    ``layers/ffn/up_proj``.
    """
    modules: list[HostModule] = []
    if not isinstance(config, ModelConfig) or config.vision is not None:
        modules = [
            HostModule(name, paths)
            for paths, name in OF_ENCODERS["modules"](config).items()
        ]
    if not isinstance(config, ModelConfig):
        return tuple(modules)
    experts: list[HostModule] = []
    stacks: list[HostModule] = []
    family = family_of(config.model_type)
    for row in family.tensors:
        paths = tuple(path.removesuffix("/kernel") for path in row.paths)
        name = row.name.removesuffix(".weight")
        if not row.paths[0].endswith("/kernel"):
            continue
        # row.experts: True for layers with experts, False for dense layers, None for both.
        if row.experts is not False and layers_with(config, paths[0], experts=True):
            if "{expert}" in name:
                experts.append(HostModule(name, paths, "expert"))
            else:
                stacks.append(
                    HostModule(name, paths, "stack", alternates=row.change == "columns")
                )
        elif "{expert}" not in name and layers_with(config, paths[0], experts=False):
            modules.append(HostModule(name, paths))
    if experts:  # transformers 5 stores all experts of a layer in two parameters
        folder = experts[0].parts[0].rpartition("/")[0]
        module = f"{_TEXT}{{layer}}.{family.experts}"
        gate_up = f"{folder}/gate_proj", f"{folder}/up_proj"
        stacks = [
            HostModule(f"{module}.gate_up_proj", gate_up, "stack"),
            HostModule(f"{module}.down_proj", (f"{folder}/down_proj",), "stack"),
        ]
    layout = (*modules, *experts, *stacks)
    if config.vision is None:
        return layout
    layout = _rename(layout, {_TEXT: _TEXT_PART})
    return _rename(layout, RENAMED_PARTS.get(config.vision.model_type, {}))


def layout_for(
    target: str, config: Host, raw: Mapping[str, Any] | None = None
) -> ModuleLayout:
    """Returns the layout that a tool expects for a base with this ``config.json``.

    vLLM reads experts one by one, except gpt-oss's. If a text model is part of a multimodal one,
    vLLM serves the latter and ignores adapters of unknown modules, so their names must be the
    multimodal model's. Of some families it then reads stacks of experts (`Family.stacks_in_vllm`).
    The target "embedding" has the names of transformers' AutoModel.
    """
    layout = module_layout(config)
    if target == "embedding":
        return _rename(layout, _WITHOUT_HEAD)
    if target != "vllm" or not isinstance(config, ModelConfig):
        return layout
    layout = _split_stacks(layout)
    if contains_text_model((raw or {}).get("model_type"), images=False):
        layout = _rename(layout, {_TEXT: _TEXT_PART})
        if family_of(config.model_type).stacks_in_vllm:
            layout = modules_of_form(layout, "linear", "stack")
    return layout


def _split_stacks(layout: ModuleLayout) -> ModuleLayout:
    """Returns ``layout`` with a name for each expert's modules beside the stacks of all experts.

    Example: the stack ``experts.down_proj`` (Gemma 4) gives ``experts.{expert}.down_proj``.
    A layout with names of experts is returned unchanged, and one whose stacks hold the columns of
    gate and up in turn (gpt-oss), which are no modules.
    """
    stacks = modules_of_form(layout, "stack")
    if modules_of_form(layout, "expert") or any(stack.alternates for stack in stacks):
        return layout
    experts = []
    for stack in stacks:
        module, _, _ = stack.name.rpartition(".")
        for path in stack.parts:
            _, _, projection = path.rpartition("/")
            name = f"{module}.{{expert}}.{projection}"
            experts.append(HostModule(name, (path,), "expert"))
    return (*modules_of_form(layout, "linear"), *experts, *stacks)


def _rename(layout: ModuleLayout, names: Mapping[str, str]) -> ModuleLayout:
    """Returns the layout with module names that start with a key of ``names`` changed to start with
    its value."""

    def rename(name: str) -> str:
        """Returns a name with the new prefix, if it starts with an old one."""
        for old, new in names.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return tuple(replace(module, name=rename(module.name)) for module in layout)


@functools.cache
def layers_with(config: Host, path: str, *, experts: bool) -> frozenset[int]:
    """Returns the layers that have a projection at a uniform path, of experts or not."""
    shapes = projection_shapes(config)
    layers = set()
    for (name, layer), (stacked, _) in stacked_places(config).items():
        # experts' kernels are [experts, d_in, d_out]
        has_experts = len(shapes[stacked]) == 3
        if name == path and has_experts == experts:
            layers.add(layer)
    return frozenset(layers)


@dataclass(frozen=True)
class Place:
    """A module of one layer, one expert's module, or a stack of experts."""

    name: str
    layer: int
    module: HostModule
    slots: tuple[tuple[str, int], ...]  # stacked path and index of each part
    widths: tuple[int, ...]  # d_out of each part
    shape: tuple[int, ...]  # of the complete kernel, (..., d_in, d_out)
    expert: int | None = None

    @property
    def stacked(self) -> bool:
        """True for a parameter of all experts."""
        return self.module.form == "stack"


def places_in(config: Host, layout: ModuleLayout) -> Iterator[Place]:
    """Yields the places of ``layout``, layer by layer; a module of one expert once per expert."""
    shapes = projection_shapes(config)
    stacked_at = stacked_places(config)
    for layer in range(1 + max(layer for _, layer in stacked_at)):
        for module in layout:
            # Some layers of a mixture are dense, so not every module is in every layer.
            if layer not in layers_with(
                config, module.parts[0], experts=module.form != "linear"
            ):
                continue
            slots = tuple(stacked_at[path, layer] for path in module.parts)
            widths = tuple(shapes[path][-1] for path, _ in slots)
            first, _ = slots[0]
            shape = (*shapes[first][:-1], sum(widths))
            experts: Iterable[int | None] = (None,)
            if module.form == "expert":
                experts = range(shape[0])
            for expert in experts:
                name = module.name.format(layer=layer, expert=expert)
                yield Place(name, layer, module, slots, widths, shape, expert)


def tensor_keys(adapted: Iterable[Place]) -> dict[str, str]:
    """Returns the module in the tensors' keys of each adapted place, by the place's name.

    PEFT wraps the experts once per parameter; the last parameter registered is the outermost.

    Args:
      adapted: places in the order of `places_in`.
    """
    keys: dict[str, str] = {}
    wrapped: Counter[int] = Counter()  # stacks by layer
    for place in reversed(list(adapted)):
        keys[place.name] = place.name
        if place.stacked:
            module = place.name.rpartition(".")[0]
            keys[place.name] = module + ".base_layer" * wrapped[place.layer]
            wrapped[place.layer] += 1
    return dict(reversed(keys.items()))


# Prefixes of module names in multimodal models: a prefix of transformers 5, mapped to its form in
# earlier releases (4.52 to 4.57, and up to 4.51).
_TOWER = "model.vision_tower."
_EARLIER: tuple[dict[str, str], ...] = (
    {_TOWER: f"{_TOWER}vision_model."},
    {
        _TOWER: "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
    },
)


def layout_of(config: Host, modules: Iterable[str]) -> ModuleLayout:
    """Returns `module_layout` with the names of the transformers release that wrote an adapter.

    Args:
      config: the base model, or a dual encoder.
      modules: names of modules in the adapter's files. If several releases match equally many of
        them, the latest is used. The modules of a text model may have their names in a multimodal
        model.
    """
    layout = module_layout(config)
    written = set(modules)
    if not isinstance(config, ModelConfig):
        return layout
    # The names before each layer differ between releases.
    if config.vision is not None:
        layouts = [layout, *(_rename(layout, names) for names in _EARLIER)]
        matches = [len(written & _place_names(config, each)) for each in layouts]
        layout = layouts[matches.index(max(matches))]
    elif any(name.startswith(_TEXT_PART) for name in written):
        layout = _rename(layout, {_TEXT: _TEXT_PART})
    elif any(name.startswith("layers.") for name in written):
        layout = _rename(layout, _WITHOUT_HEAD)
    # transformers 4 has a module for each expert, transformers 5 a stack of all experts.
    if any(map(_ONE_EXPERT.search, written)):
        return _split_stacks(layout)
    if modules_of_form(layout, "stack"):
        # If single experts' modules were in the layout, "w1" (LFM2-MoE) would target experts in
        # addition to the dense layers.
        return modules_of_form(layout, "linear", "stack")
    return layout


def _place_names(config: Host, layout: ModuleLayout) -> set[str]:
    """Returns the names of all modules of a model."""
    return {place.name for place in places_in(config, layout)}


_KEYS = "layers/attn/k_proj"
_VALUES = "layers/attn/v_proj"


def value_names(config: Host, layout: ModuleLayout) -> dict[str, str]:
    """Returns the name `v_proj` for each `k_proj` of layers whose values are the keys' projection
    (Gemma 4).

    vLLM loads the weight of `k_proj` into the slots of keys and of values, but an adapter only into
    the slot of its name: without a copy named `v_proj` it would serve values of the base.
    """
    with_keys = layers_with(config, _KEYS, experts=False)
    layers = with_keys - layers_with(config, _VALUES, experts=False)
    if not layers:
        return {}
    return {
        place.name: f"{place.name.removesuffix('k_proj')}v_proj"
        for place in places_in(config, modules_of_form(layout, "linear"))
        if place.module.parts == (_KEYS,) and place.layer in layers
    }


# ---------------------------------------------------------------- adapters of one layer


@dataclass(frozen=True)
class ModuleAdapter:
    """One layer's adapter without padding; the axis of experts, if any, comes first."""

    a: np.ndarray  # [..., d_in, r] float32
    b: np.ndarray  # [..., r, d_out] float32
    scale: float
    magnitude: np.ndarray | None = None  # [d_out] float32

    @property
    def rank(self) -> int:
        """The adapter's rank."""
        return int(self.a.shape[-1])


def fuse(
    parts: Sequence[ModuleAdapter | None],
    widths: Sequence[int],
    *,
    alternates: bool = False,
) -> ModuleAdapter | None:
    """Combines the adapters of a fused module's parts into one; None if no part has an adapter.

    Args:
      parts: the adapter of each part, or None (its outputs get zeros).
      widths: ``d_out`` of every part.
      alternates: the parts' outputs alternate; they are equally wide and have no magnitudes.

    Scales that differ are folded into B, relative to the first part's.
    """
    present = [adapter for adapter in parts if adapter is not None]
    if len(parts) == 1 or not present:
        return parts[0]
    a = present[0].a
    scale = present[0].scale
    lead = present[0].b.shape[:-2]
    shared = all(np.array_equal(a, adapter.a) for adapter in present)
    if not shared:
        a = np.concatenate([adapter.a for adapter in present], axis=-1)
    b = np.zeros((*lead, a.shape[-1], sum(widths)), np.float32)
    row = column = 0
    for adapter, width in zip(parts, widths, strict=True):
        if adapter is not None:
            block = adapter.b * np.float32(adapter.scale / scale)
            # Block-diagonal; with a shared A every part uses the same rows (see the module's text).
            b[..., row : row + adapter.rank, column : column + width] = block
            if not shared:
                row += adapter.rank
        column += width
    if alternates:
        # [..., r, d_out] -> [..., r, parts, width] -> [..., r, width, parts] -> [..., r, d_out]
        by_part = b.reshape(*lead, a.shape[-1], len(parts), -1)
        b = by_part.swapaxes(-1, -2).reshape(b.shape)
    magnitude = None
    if present[0].magnitude is not None and len(present) == len(parts):
        magnitude = np.concatenate(
            [adapter.magnitude for adapter in present if adapter.magnitude is not None]
        )
    return ModuleAdapter(a, b, scale, magnitude)


def split_fused(
    adapter: ModuleAdapter, widths: Sequence[int], *, alternates: bool = False
) -> list[ModuleAdapter | None]:
    """Splits a fused module's adapter into its parts: inverts `fuse` up to folded scales.

    Arguments as in `fuse`. A part keeps the ranks that reach its outputs; a part that no rank
    reaches gets no adapter. A fresh adapter (B all zero) keeps every rank in every part.
    """
    if len(widths) == 1:
        return [adapter]
    fresh = not adapter.b.any()
    parts: list[ModuleAdapter | None] = []
    # first column of each part
    starts = np.cumsum([0, *widths[:-1]])
    for number, (start, width) in enumerate(zip(starts, widths, strict=True)):
        if alternates:
            columns = slice(number, None, len(widths))
        else:
            columns = slice(start, start + width)
        block = adapter.b[..., columns]
        magnitude = None
        if adapter.magnitude is not None:
            magnitude = adapter.magnitude[start : start + width]
        # A part needs its magnitude to keep its column norms, so with DoRA every part stays.
        keeps_all = fresh or (magnitude is not None and not block.any())
        keep = _live_ranks(block) | keeps_all  # bool [r]
        if not keep.any():
            parts.append(None)
            continue
        a = adapter.a[..., keep]
        b = block[..., keep, :]
        parts.append(ModuleAdapter(a, b, adapter.scale, magnitude))
    return parts


def fold(adapter: ModuleAdapter, rank: int, scale: float) -> ModuleAdapter:
    """Zero-pads an adapter to ``rank`` and multiplies B by the ratio of its scale to ``scale``."""
    b = adapter.b * np.float32(adapter.scale / scale)
    return ModuleAdapter(*pad_rank(adapter.a, b, rank), scale, adapter.magnitude)


def compact(adapter: ModuleAdapter) -> ModuleAdapter:
    """Returns the equivalent adapter without the ranks whose row of B is zero."""
    keep = _live_ranks(adapter.b)
    return ModuleAdapter(
        adapter.a[..., keep],
        adapter.b[..., keep, :],
        adapter.scale,
        adapter.magnitude,
    )


def _live_ranks(b: np.ndarray) -> np.ndarray:
    """Returns bool ``[r]``: ranks with a nonzero entry in ``b [..., r, d_out]`` (of any expert)."""
    others = tuple(axis for axis in range(b.ndim) if axis != b.ndim - 2)
    return np.any(b != 0, axis=others)


def alpha_for(scale: float, rank: int, *, rslora: bool) -> float:
    """Returns the alpha that gives ``scale`` at ``rank``, without ``alpha / rank``'s rounding."""
    alpha = scale * scale_divisor(rank, rslora=rslora)
    # 16 instead of 15.999999999999998
    neat = round(alpha, 6)
    if math.isclose(alpha, neat, rel_tol=1e-12):
        return neat
    return alpha
