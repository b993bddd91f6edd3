"""The architecture of a decoder as one frozen dataclass, read from a ``config.json``, and the
classes of its parts.

`nalora_jax.models.family` reads it by the record of its ``model_type``; the records are entered
when this package is imported.

A part is a frozen dataclass: it names its parameters and returns its Linen module.
`ModelConfig.mixer` and `ModelConfig.ffn` hold parts with sizes of their own; without them the
fields of the config describe attention, a gated block or a mixture of experts
(`nalora_jax.models.stacks.parts`).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nalora_jax.models.family import read
from nalora_jax.models.readers import GLOBAL_WINDOW as GLOBAL_WINDOW
from nalora_jax.models.ropes import RopeSpec

if TYPE_CHECKING:
    import flax.linen as nn

    from nalora_jax.models.embedding import LayerEmbeddings
    from nalora_jax.models.parts import PartOptions
    from nalora_jax.models.vision.patch_config import PatchSpec
    from nalora_jax.models.vision.vision_config import VisionSpec
    from nalora_jax.ops.dispatch import Numerics

ParamShapes = dict[str, tuple[int, ...]]
Gates = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Every default means "the feature is absent"."""

    model_type: str  # the family (`nalora_jax.models.families`)
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int  # channels of the FFN; of one expert in a mixture
    activation: str  # a name of nalora_jax.method.activations
    max_positions: int
    norm_eps: float
    ropes: tuple[RopeSpec, ...]  # the distinct rotary embeddings
    rope_index: tuple[int, ...] = ()  # per layer: its entry of `ropes`, -1: none; (): 0
    rope_adjacent: bool = (
        False  # dimension 2 i is rotated with 2 i + 1, not i with i + dim / 2
    )
    # Per layer: keys seen, the token included; () means GLOBAL_WINDOW everywhere.
    windows: tuple[int, ...] = ()
    tie_embeddings: bool = False  # the head is the transposed embedding
    gated: bool = True  # phi(x W_gate) * (x W_up); False: phi(x W_in)
    # experts: phi is multiplied by 1 + clip(x W_up, -limit, limit); 0: by x W_up
    up_limit: float = 0.0
    qkv_bias: bool = False
    o_bias: bool = False
    ffn_bias: bool = False
    # RMS norm of queries and keys: per head, per head after RoPE, or over all heads.
    qk_norm: Literal["", "head", "rotated", "projection"] = ""
    pre_norm: bool = True  # norms of the inputs of attention and FFN
    post_norm: bool = False  # norms of their outputs, before the residual sum
    norm_offset: float = 0.0  # 1 if the checkpoint stores w of the norm scale 1 + w
    query_scale: float = 0.0  # multiplies the scores; 0 means head_dim ** -0.5
    # Queries are multiplied by 1 + query_growth * log(1 + position // growth_length); 0 means
    # never.
    query_growth: float = 0.0
    growth_length: int = 0
    attn_softcap: float = 0.0  # scores become cap * tanh(scores / cap); 0 means none
    # q_proj also computes gates: each head's output is multiplied by sigmoid(gate)
    attn_gate: bool = False
    attn_sinks: bool = (
        False  # a learned score per head that every query sees and that has no value
    )
    attn_dropout: float = 0.0  # rate on attention probabilities, in training only
    residual_dropout: float = (
        0.0  # rate on the outputs of attention and FFN, in training only
    )
    embed_scale: float = 1.0  # multiplies the embeddings
    residual_scale: float = 1.0  # multiplies the outputs of attention and FFN
    logit_scale: float = 1.0  # multiplies the logits
    final_softcap: float = 0.0  # logits become cap * tanh(logits / cap); 0 means none
    n_experts: int = 0  # 0: a dense FFN
    experts_per_token: int = 0
    router_bias: bool = False
    # image tower and projector of a vision-language model
    vision: VisionSpec | PatchSpec | None = None
    mixer: Mixer | None = None  # in place of attention
    ffn: FeedForward | None = None  # in place of a gated block; of layers with experts
    layer_embeddings: LayerEmbeddings | None = (
        None  # vectors of tokens that every layer receives
    )
    deepstack: bool = False  # image features are added to the outputs of its layers
    tail: Part | None = None  # after the feed-forward block, on the residual stream
    # Bits of a weight of each projection that its files store quantized, scales included, by path
    # of its kernel; for estimates only.
    stored_bits: tuple[tuple[str, float], ...] = ()
    # Kinds of layers: the fields that differ from this config's. `models.stacks` gives each kind's
    # config; `windows` and `rope_index` list all layers of the model in order.
    kinds: tuple[tuple[tuple[str, Any], ...], ...] = ()
    layer_kinds: tuple[
        int, ...
    ] = ()  # per layer: its entry of `kinds`; (): this config

    @property
    def attends(self) -> bool:
        """True for layers of softmax attention."""
        return self.mixer is None or self.mixer.attends

    @property
    def has_axes(self) -> bool:
        """True if RoPE reads rows and columns of images (`RopeSpec.axes`)."""
        return any(spec.axes for spec in self.ropes)

    @property
    def hands(self) -> str:
        """See `Mixer.hands`."""
        if self.mixer is None:
            return ""
        return self.mixer.hands

    @property
    def reads(self) -> str:
        """See `Mixer.reads`; such layers have no cache."""
        if self.mixer is None:
            return ""
        return self.mixer.reads

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """The window of every layer."""
        return self.windows or (GLOBAL_WINDOW,) * self.n_layers

    @property
    def layer_ropes(self) -> tuple[int, ...]:
        """The rotary table of every layer.

        Layers without RoPE have the identity, which is stored after the last of `ropes`.
        """
        indices = self.rope_index or (0,) * self.n_layers
        return tuple(len(self.ropes) if index < 0 else index for index in indices)

    @staticmethod
    def from_hf(
        raw: Mapping[str, Any], where: str = "config.json", *, images: bool = False
    ) -> ModelConfig:
        """Returns the config described by a parsed ``config.json`` of transformers 4 or 5.

        Args:
          raw: the parsed file.
          where: its name, for messages.
          images: include the image tower and the projector of a multimodal model; by default only
            its text model is read.

        Raises:
          NaloraError: an unknown ``model_type``, a missing or ill-typed field, or a feature that is
            not implemented.
        """
        return ModelConfig(**read(raw, where, images))

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain values, for JSON and fingerprints."""
        return dataclasses.asdict(self)


# ---------------------------------------------------------------- parts of a layer


class Part(ABC):
    """Sizes of a part; every method takes the uniform config of its stack."""

    name: ClassVar[str]  # of the module: parameters are at layers/<name>/...

    def param_shapes(self, config: ModelConfig) -> ParamShapes:
        """Returns the shapes of a layer's parameters: of `arrays`, and of kernels and biases of
        `projections`."""
        shapes = dict(self.arrays(config))
        for name, shape in self.projections(config).items():
            shapes[f"{name}/kernel"] = shape
            if self.has_bias(config, name):
                shapes[f"{name}/bias"] = (*shape[:-2], shape[-1])
        return shapes

    def arrays(self, config: ModelConfig) -> ParamShapes:
        """Returns the shapes of a layer's parameters that belong to no projection."""
        return {}

    @abstractmethod
    def projections(self, config: ModelConfig) -> ParamShapes:
        """Returns kernel shapes ``(..., d_in, d_out)`` of adaptable projections, by name."""

    def has_bias(self, config: ModelConfig, name: str) -> bool:
        """Returns True if a projection has a bias."""
        return False

    def flops(self, config: ModelConfig, seq: int) -> float:
        """Returns the forward flops of all layers for one row, without `projections` and
        routers."""
        return 0.0

    @abstractmethod
    def saved(self, config: ModelConfig) -> float:
        """Returns the values per token, in the projections' dtype, saved for the backward pass."""

    def gates(self, config: ModelConfig) -> Gates:
        """Returns channel shape and activation of each gated block, by its path within the part."""
        return {}

    @abstractmethod
    def module(self, config: ModelConfig, options: PartOptions) -> nn.Module:
        """Returns the Linen module."""


class Mixer(Part):
    """A part that mixes the tokens of a row, in place of attention.

    Its module is called as ``(x, LayerInputs, SharedInputs) -> (y, update of its state)``.
    """

    attends: ClassVar[bool] = (
        False  # True: softmax attention with the config's heads and windows
    )
    # True: the module also computes parts of rows (`nalora_jax.ops.split_rows`).
    splits_rows: ClassVar[bool] = False
    # True: the state has a slot of each token, so that texts may share a prefix's.
    has_slots: ClassVar[bool] = False
    hands: str = ""  # name under which later layers read this layer's keys and values
    reads: str = ""  # name of an earlier layer's keys and values that this layer reads

    @abstractmethod
    def init_state(
        self, config: ModelConfig, batch: int, length: int, numerics: Numerics
    ) -> Any:
        """Returns the state of ``config.n_layers`` layers before the first token (`models.cache`).

        ``length`` is the number of slots for tokens.
        """

    def state_values(self, config: ModelConfig, tensor: int) -> float:
        """Returns the values per token and layer that generation stores on each of ``tensor``
        devices that share a row; 0 for a state of one size."""
        return 0.0


class FeedForward(Part):
    """A part that transforms each token, in place of the gated block.

    Its module has the call signature of `nalora_jax.method.ffn.GatedFFN`.
    """

    reads_stream: ClassVar[bool] = (
        False  # True: the module also gets ``stream``, the norm's input
    )

    def has_bias(self, config: ModelConfig, name: str) -> bool:
        """See `Part`."""
        return config.ffn_bias
