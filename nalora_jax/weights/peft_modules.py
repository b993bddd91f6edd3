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
from typing import Any, Literal

import numpy as np

from nalora_jax.models.adapters import pad_rank
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.family import contains_text_model, family_of
from nalora_jax.models.stacks import projection_shapes, stacked_places
from nalora_jax.models.targets import AdapterSpec, scale_divisor
from nalora_jax.models.vision.config import DualConfig
from nalora_jax.weights.encoders import encoder_modules
from nalora_jax.weights.peft_tables import token_settings

Host = ModelConfig | DualConfig
# A Linear module, one expert's Linear module, or the parameter of all experts of a layer.
Form = Literal["linear", "expert", "stack"]


@dataclass(frozen=True)
class HostModule:
    """A module (or parameter) of one layer, and the projections whose outputs it concatenates."""

    name: str  # within the layer: "mlp.gate_up_proj"; of an expert "experts.{}.w1"
    parts: tuple[str, ...]  # stacked paths: ("layers/ffn/gate_proj", "layers/ffn/up_proj")
    form: Form = "linear"
    whole: bool = False  # the name is the full one, with {layer} in it if there are several
    alternates: bool = False  # the parts' outputs alternate instead of following each other


@dataclass(frozen=True)
class ModuleLayout:
    """The modules of a family's projections."""

    modules: tuple[HostModule, ...]  # stacks are last, in the order in which they are registered
    prefix: str = "model.layers"

    def of(self, form: Form) -> tuple[HostModule, ...]:
        """Returns the modules of one form."""
        return tuple(module for module in self.modules if module.form == form)

    def without(self, form: Form) -> ModuleLayout:
        """Returns the layout without the modules of one form."""
        return replace(self, modules=tuple(module for module in self.modules if module.form != form))

    def weight_only(self) -> frozenset[HostModule]:
        """Returns the Linear modules that PEFT adapts by their weight only, as parameters.

        PEFT takes names of target_modules that end like an expert's modules in transformers 4 for
        the experts, also if they name a dense layer or a shared expert.
        """
        lasts = {short_name(module.name) for module in self.of("expert")}
        return frozenset(module for module in self.of("linear") if short_name(module.name) in lasts)

    def full_name(self, layer: int, module: HostModule) -> str:
        """Returns the full name, e.g. ``model.layers.3.mlp.gate_proj`` for layer 3."""
        if module.whole:
            return module.name.format(layer=layer)
        return f"{self.prefix}.{layer}.{module.name}"


_LAYER, _EXPERT = ".{layer}.", "{expert}"
_TEXT_PART = "model.language_model.layers"  # prefix in multimodal models
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def module_layout(config: Host) -> ModuleLayout:
    """Returns the layout of a family: the modules whose weights are in its checkpoints.

    Example: the row ``model.layers.{layer}.mlp.gate_up_proj.weight`` of Phi-3's table is the
    module ``mlp.gate_up_proj`` with the parts ``layers/ffn/gate_proj`` and ``layers/ffn/up_proj``.
    """
    modules = [HostModule(name, (path,), whole=True) for path, name in encoder_modules(config).items()]
    if isinstance(config, DualConfig):
        return ModuleLayout(tuple(modules))
    experts: list[HostModule] = []
    stacks: list[HostModule] = []
    family = family_of(config.model_type)
    for row in family.tensors:
        paths = tuple(path.removesuffix("/kernel") for path in row.paths)
        name = row.name.partition(_LAYER)[2].removesuffix(".weight")
        if not row.paths[0].endswith("/kernel"):
            continue
        if row.experts is not False and layers_with(config, paths[0], experts=True):
            if _EXPERT in name:
                experts.append(HostModule(name.replace(_EXPERT, "{}"), paths, "expert"))
            else:
                stacks.append(HostModule(name, paths, "stack", alternates=row.change == "columns"))
        elif _EXPERT not in name and layers_with(config, paths[0], experts=False):
            modules.append(HostModule(name, paths))
    if experts:  # transformers 5 holds all experts of a layer in two parameters
        folders = dict.fromkeys(module.parts[0].rpartition("/")[0] for module in experts)
        stacks = [
            HostModule(f"{family.experts}.{name}", tuple(f"{folder}/{part}" for part in parts), "stack")
            for folder in folders
            for name, parts in {
                "gate_up_proj": ("gate_proj", "up_proj"),
                "down_proj": ("down_proj",),
            }.items()
        ]
    prefix = "model.layers" if config.sight is None else _TEXT_PART
    return ModuleLayout((*modules, *experts, *stacks), prefix)


def layout_for(target: str, config: Host, raw: Mapping[str, Any] | None = None) -> ModuleLayout:
    """Returns the layout that a tool expects for a base with this ``config.json``.

    vLLM reads experts one by one, except gpt-oss's. If a text model is part of a multimodal one,
    vLLM serves the latter and ignores adapters of unknown modules, so their names must be the
    multimodal model's. Of some families it then reads stacks of experts (`Family.stacks_in_vllm`).
    """
    layout = module_layout(config)
    if target != "vllm" or isinstance(config, DualConfig):
        return layout
    layout = _expert_by_expert(layout)
    if contains_text_model((raw or {}).get("model_type"), images=False):
        layout = replace(layout, prefix=_TEXT_PART)
        if family_of(config.model_type).stacks_in_vllm:
            layout = layout.without("expert")
    return layout


def _expert_by_expert(layout: ModuleLayout) -> ModuleLayout:
    """Returns ``layout`` with a name for each expert's modules, if its stacks do not alternate.

    Example: the stack ``experts.down_proj`` (Gemma 4) gives ``experts.{}.down_proj``.
    """
    stacks = layout.of("stack")
    if layout.of("expert") or any(stack.alternates for stack in stacks):
        return layout
    experts = [
        HostModule(f"{stack.name.rpartition('.')[0]}.{{}}.{path.rpartition('/')[2]}", (path,), "expert")
        for stack in stacks
        for path in stack.parts
    ]
    return replace(layout, modules=(*layout.of("linear"), *experts, *stacks))


@functools.cache
def layers_with(config: Host, path: str, *, experts: bool) -> frozenset[int]:
    """Returns the layers that have a projection at a uniform path, of experts or not."""
    shapes = projection_shapes(config)
    places = (
        (layer, shapes[stacked])
        for (name, layer), (stacked, _) in stacked_places(config).items()
        if name == path
    )
    return frozenset(layer for layer, shape in places if (len(shape) == 3) == experts)


@dataclass(frozen=True)
class Place:
    """A module of one layer, one expert's module, or a stack of experts."""

    name: str  # the full one
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
    """Yields the places of ``layout``, layer by layer."""
    shapes, stacked_at = projection_shapes(config), stacked_places(config)

    def place(layer: int, module: HostModule) -> Place:
        slots = tuple(stacked_at[path, layer] for path in module.parts)
        widths = tuple(shapes[path][-1] for path, _ in slots)
        shape = (*shapes[slots[0][0]][:-1], sum(widths))
        return Place(layout.full_name(layer, module), layer, module, slots, widths, shape)

    for layer in range(1 + max(layer for _, layer in stacked_at)):
        for module in layout.modules:
            if layer not in layers_with(config, module.parts[0], experts=module.form != "linear"):
                continue
            of_layer = place(layer, module)
            if module.form != "expert":
                yield of_layer
                continue
            for expert in range(of_layer.shape[0]):
                yield replace(of_layer, name=of_layer.name.format(expert), expert=expert)


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
            keys[place.name] = place.name.rpartition(".")[0] + ".base_layer" * wrapped[place.layer]
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
    """Returns `module_layout` with the names of the transformers release that wrote ``modules``.

    If several releases match equally well, the latest is used. The modules of a text model may have
    their names in a multimodal model.
    """
    latest, written = module_layout(config), set(modules)
    layout = latest
    if isinstance(config, DualConfig):
        return latest
    if config.sight is not None:
        layouts = [latest, *(_renamed(latest, names) for names in _EARLIER)]
        layout = max(
            layouts, key=lambda layout: len(written & {place.name for place in places_in(config, layout)})
        )
    elif any(name.startswith(_TEXT_PART) for name in written):
        layout = replace(latest, prefix=_TEXT_PART)
    return _expert_by_expert(layout) if any(map(_ONE_EXPERT.search, written)) else layout


def _renamed(layout: ModuleLayout, names: Mapping[str, str]) -> ModuleLayout:
    def earlier(name: str) -> str:
        return next(
            (old + name.removeprefix(new) for new, old in names.items() if name.startswith(new)), name
        )

    modules = tuple(
        replace(module, name=earlier(module.name)) if module.whole else module for module in layout.modules
    )
    return replace(layout, modules=modules, prefix=earlier(layout.prefix))


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
    parts: Sequence[ModuleAdapter | None], widths: Sequence[int], *, alternates: bool = False
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
    a, scale, lead = present[0].a, present[0].scale, present[0].b.shape[:-2]
    shared = all(np.array_equal(a, adapter.a) for adapter in present)
    if not shared:
        a = np.concatenate([adapter.a for adapter in present], axis=-1)
    b = np.zeros((*lead, a.shape[-1], sum(widths)), np.float32)
    row = column = 0
    for adapter, width in zip(parts, widths, strict=True):
        if adapter is not None:
            block = adapter.b * np.float32(adapter.scale / scale)
            b[..., row : row + adapter.rank, column : column + width] = block
            if not shared:
                row += adapter.rank
        column += width
    if alternates:
        b = b.reshape(*lead, a.shape[-1], len(parts), -1).swapaxes(-1, -2).reshape(b.shape)
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

    A part keeps the ranks that reach its outputs; a part that no rank reaches gets no adapter. A
    fresh adapter (B all zero) keeps every rank in every part.
    """
    if len(widths) == 1:
        return [adapter]
    fresh = not adapter.b.any()
    parts: list[ModuleAdapter | None] = []
    for number, (start, width) in enumerate(zip(np.cumsum([0, *widths[:-1]]), widths, strict=True)):
        columns = slice(number, None, len(widths)) if alternates else slice(start, start + width)
        block = adapter.b[..., columns]
        magnitude = None
        if adapter.magnitude is not None:
            magnitude = adapter.magnitude[start : start + width]
        # A part needs its magnitude to keep its column norms, so with DoRA every part stays.
        keep = _live_ranks(block) | (fresh or (magnitude is not None and not block.any()))
        piece = ModuleAdapter(adapter.a[..., keep], block[..., keep, :], adapter.scale, magnitude)
        parts.append(piece if piece.rank else None)
    return parts


def fold(adapter: ModuleAdapter, rank: int, scale: float) -> ModuleAdapter:
    """Zero-pads an adapter to ``rank`` and multiplies B by the ratio of its scale to ``scale``."""
    b = adapter.b * np.float32(adapter.scale / scale)
    return ModuleAdapter(*pad_rank(adapter.a, b, rank), scale, adapter.magnitude)


def compact(adapter: ModuleAdapter) -> ModuleAdapter:
    """Returns the equivalent adapter without the ranks whose row of B is zero."""
    keep = _live_ranks(adapter.b)
    return ModuleAdapter(adapter.a[..., keep], adapter.b[..., keep, :], adapter.scale, adapter.magnitude)


def _live_ranks(b: np.ndarray) -> np.ndarray:
    """Returns bool ``[r]``: ranks with a nonzero entry in ``b [..., r, d_out]`` (of any expert)."""
    return np.any(b != 0, axis=tuple(i for i in range(b.ndim) if i != b.ndim - 2))


def alpha_for(scale: float, rank: int, *, rslora: bool) -> float:
    """Returns the alpha that gives ``scale`` at ``rank``, without ``alpha / rank``'s rounding."""
    alpha = scale * scale_divisor(rank, rslora=rslora)
    neat = round(alpha, 6)
    if math.isclose(alpha, neat, rel_tol=1e-12):
        return neat
    return alpha


# ---------------------------------------------------------------- settings and tensors of the files


@dataclass(frozen=True)
class Entry:
    """The adapter of one place."""

    place: Place
    adapter: ModuleAdapter
    parameter: bool = False  # named in target_parameters


def common(values: Iterable[Any]) -> Any:
    """Returns the most frequent value; the first of them if several are equally frequent."""
    return Counter(values).most_common(1)[0][0]


def adapter_tensors(entries: list[Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the array of each tensor."""
    keys = tensor_keys(entry.place for entry in entries)
    for entry in entries:
        key, a, b = keys[entry.place.name], entry.adapter.a.T, entry.adapter.b.T
        if entry.place.stacked:
            # [experts, d_in, r] -> [experts * r, d_in]; [experts, r, d_out] -> [d_out, r * experts]
            a = entry.adapter.a.transpose(0, 2, 1).reshape(-1, entry.adapter.a.shape[1])
            b = entry.adapter.b.transpose(2, 1, 0).reshape(entry.adapter.b.shape[2], -1)
        yield f"base_model.model.{key}.lora_A.weight", np.ascontiguousarray(a)
        yield f"base_model.model.{key}.lora_B.weight", np.ascontiguousarray(b)
        if entry.adapter.magnitude is not None:
            yield (
                f"base_model.model.{key}.lora_magnitude_vector",
                np.ascontiguousarray(entry.adapter.magnitude),
            )


def adapter_settings(
    entries: list[Entry], config: Host, layout: ModuleLayout, spec: AdapterSpec, *, rslora: bool
) -> dict[str, Any]:
    """Returns ``adapter_config.json`` without the base model's name."""
    modules = [entry for entry in entries if not entry.parameter]
    parameters = [entry for entry in entries if entry.parameter]
    ranks = {entry.place.name: entry.adapter.rank for entry in entries}
    alphas = {
        entry.place.name: _number(alpha_for(entry.adapter.scale, entry.adapter.rank, rslora=rslora))
        for entry in entries
    }
    rank, rank_pattern = _pattern(ranks, entries)
    alpha, alpha_pattern = _pattern(alphas, entries)
    settings = {
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": list(spec.saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": _target_modules(modules, config, layout),
        "task_type": "CAUSAL_LM" if isinstance(config, ModelConfig) else None,
        "use_dora": spec.dora,
        "use_rslora": rslora,
    }
    if parameters:
        settings["target_parameters"] = _target_parameters(parameters, config)
    return settings | token_settings(spec)


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _pattern(values: Mapping[str, Any], entries: list[Entry]) -> tuple[Any, dict[str, Any]]:
    """Returns a default value and a pattern for the modules with another value.

    The default is the parameters' most frequent value, otherwise the most frequent of all. Keys
    are ``mlp.up_proj`` if all layers agree, full names otherwise.
    """
    parameters = [values[entry.place.name] for entry in entries if entry.parameter]
    usual = common(parameters or values.values())
    modules: dict[str, list[str]] = {}
    for entry in entries:
        modules.setdefault(entry.place.module.name, []).append(entry.place.name)
    pattern = {}
    for module, names in modules.items():
        members_of = {values[name] for name in names}
        if members_of == {usual}:
            continue
        if len(members_of) == 1 and "{layer}" not in module:
            pattern[module] = members_of.pop()
        else:
            pattern |= {name: values[name] for name in names if values[name] != usual}
    return usual, dict(sorted(pattern.items()))


def _target_modules(entries: list[Entry], config: Host, layout: ModuleLayout) -> list[str]:
    """Returns short names of modules that are adapted in all layers, full names of the others."""
    adapted: dict[str, set[str]] = {}
    for entry in entries:
        adapted.setdefault(short_name(entry.place.name), set()).add(entry.place.name)
    names_of: dict[str, set[str]] = {}
    # A short name would target the experts too, which a file of their stacks does not hold one by one.
    single = (*layout.of("linear"), *module_layout(config).of("expert"))
    for place in places_in(config, replace(layout, modules=single)):
        names_of.setdefault(short_name(place.name), set()).add(place.name)
    names: set[str] = set()
    # A vision tower has modules with the same short names as a decoder or a text tower.
    unique = isinstance(config, ModelConfig) and config.sight is None
    for last, members in adapted.items():
        if unique and members >= names_of.get(last, set()):
            members = {last}
        names |= members
    return sorted(names)


def short_name(name: str) -> str:
    """Returns the last part of a module's name."""
    return name.rpartition(".")[2]


def _target_parameters(entries: list[Entry], config: Host) -> list[str]:
    """Returns names within the layer of parameters adapted in all layers, full names of the others."""
    names: set[str] = set()
    for module in {entry.place.module for entry in entries}:
        members = [entry.place for entry in entries if entry.place.module == module]
        stacked = members[0].stacked
        listed = {place.name for place in members}
        if {place.layer for place in members} == layers_with(config, module.parts[0], experts=stacked):
            listed = {module.name}
        weight = "" if stacked else ".weight"
        names |= {name + weight for name in listed}
    return sorted(names)


# ---------------------------------------------------------------- values that are the keys' projection
#
# In layers whose values are the keys' projection (Gemma 4), vLLM loads the weight of `k_proj` into
# the slots of keys and of values, but an adapter only into the slot of its name: without a copy
# named `v_proj` it would serve values of the base.


_KEYS, _VALUES = "layers/attn/k_proj", "layers/attn/v_proj"


def copies_for_values(entries: list[Entry], config: Host) -> list[Entry]:
    """Returns the adapters of ``k_proj`` under the name ``v_proj``, in layers without a ``v_proj``."""
    layers = _layers(config)
    keys = [e for e in entries if e.place.module.parts == (_KEYS,) and e.place.layer in layers]
    return [
        replace(entry, place=replace(entry.place, name=_values_name(entry.place.name))) for entry in keys
    ]


def without_copies(
    modules: Mapping[str, dict[str, np.ndarray]], config: Host, layout: ModuleLayout
) -> dict[str, dict[str, np.ndarray]]:
    """Returns a file's modules without the copies of `copies_for_values`, which equal their original."""
    layers = _layers(config)
    names = [
        place.name
        for place in places_in(config, layout.without("expert"))
        if place.module.parts == (_KEYS,) and place.layer in layers
    ]
    copies = {_values_name(name) for name in names if _equal(modules, name, _values_name(name))}
    return {name: tensors for name, tensors in modules.items() if name not in copies}


def _layers(config: Host) -> frozenset[int]:
    return layers_with(config, _KEYS, experts=False) - layers_with(config, _VALUES, experts=False)


def _values_name(name: str) -> str:
    return f"{name.removesuffix('k_proj')}v_proj"


def _equal(modules: Mapping[str, dict[str, Any]], name: str, other: str) -> bool:
    """Returns True if both modules are in the file with the same tensors."""
    first, second = modules.get(name, {}), modules.get(other, {})
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
