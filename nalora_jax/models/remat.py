"""Scanned layers and their rematerialization policies.

A policy is named after the activations that it saves. Policies that end in ``_offload`` save the
same activations in pinned host memory: each layer's transfer is overlapped with matmuls of the
forward pass, and the activations return in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from nalora_jax.errors import NaloraError
from nalora_jax.method.ffn import PREACTIVATIONS
from nalora_jax.models.replay import ROUTING
from nalora_jax.ops.dispatch import Numerics, native_kind
from nalora_jax.ops.storage import LAYER_INPUT, SAVED, SAVED_WIDE, STACKS, SUMS

OFFLOAD = "_offload"
# Activations saved for the backward pass: "none" saves all, "full" the layer's input only, "dots"
# also the results of matmuls, and "attention" the same without arrays as wide as the FFN.
_SAVES: dict[str, tuple[str, ...]] = {
    "full": (),
    "attention": (SAVED,),
    "dots": (SAVED, SAVED_WIDE),
}
# "dots" in the last layer of each period of layers (`nalora_jax.models.stacks`), "attention" in the
# others.
DOTS_LAST = "dots_last"
REMAT = ("none", *_SAVES, DOTS_LAST, *(name + OFFLOAD for name in _SAVES))
# platforms whose devices have memory separate from the host's
_WITH_HOST_MEMORY = (
    "tpu",
    "gpu",
)
# Largest d_model at which recomputing matmuls on a CPU's tiles is faster than saving their results
# (measured with benchmarks/versus_peft.py). The time of a matmul per byte of its result grows with
# d_model, the time to save a byte does not.
_WIDEST_RECOMPUTED = 1024


def select_remat(
    asked: str, d_model: int, numerics: Numerics, *, gated: bool = True
) -> str:
    """Returns ``asked``, or the platform's cheapest policy for "auto".

    A block with one wide matmul (not ``gated``) has half as much to save: CLIP ViT-B/16 is 6%
    faster with "dots" on a CPU.

    Raises:
      NaloraError: see `check_remat`.
    """
    check_remat(asked, numerics.platform.name)
    if asked != "auto":
        return asked
    if numerics.facts_of != "cpu":
        return "full"
    recomputes = (
        gated and d_model <= _WIDEST_RECOMPUTED and native_kind(numerics) == "tiles"
    )
    if recomputes:
        return "attention"
    return "dots"


def select_expert_kernel(asked: str, remat: str) -> str:
    """Returns ``asked``, but "gather" for "auto" if saved activations are offloaded.

    With rows that are sent and inputs that are saved on the host, libtpu 0.0.42 aborts the process
    on most meshes of one slice, while it chooses layouts ("num_window_dims == normalized_rank -
    1").
    """
    if asked == "auto" and remat.endswith(OFFLOAD):
        return "gather"
    return asked


def check_remat(asked: str, platform: str) -> None:
    """Raises an error for an offloading policy on a platform without separate device memory.

    Raises:
      NaloraError: the platform's devices compute in the host's own memory.
    """
    if asked.endswith(OFFLOAD) and platform not in _WITH_HOST_MEMORY:
        device = platform or "this platform"
        expected = f"a policy without {OFFLOAD} on {device}, whose memory is the host's"
        remedy = f"use {asked.removesuffix(OFFLOAD)}, or auto"
        raise NaloraError(
            "--compute.remat", expected=expected, found=asked, remedy=remedy
        )


def position_policy(remat: str, position: int, period: int) -> str:
    """Returns the policy of the layers at one position of a period; uniform layers have a period of
    1."""
    if remat != DOTS_LAST:
        return remat
    if position == period - 1:
        return "dots"
    return "attention"


def stack_layers(block: Any, remat: str, n_layers: int, *, drops: bool = True) -> Any:
    """Returns ``block``, a module of one layer, scanned over layers and rematerialized; see
    `scan_layers`."""
    return scan_layers(
        rematerialize(block, position_policy(remat, 0, 1)), n_layers, drops=drops
    )


def rematerialize(block: Any, remat: str) -> Any:
    """Returns ``block``, a module of one layer, with the rematerialization policy ``remat``.

    A block whose input is offloaded must name it `LAYER_INPUT` at its start.
    """
    if remat not in REMAT:
        raise ValueError(f"remat: expected one of {', '.join(REMAT)}, found {remat!r}")
    if remat == "none":
        return block
    return nn.remat(block, policy=_policy(remat), prevent_cse=False)


def scan_layers(block: Any, n_layers: int, *, drops: bool = True) -> Any:
    """Returns ``block`` scanned over the leading axis of its variables and of its first input.

    Flax traces the block twice to check that broadcast variables are constant. Without dropout
    (``drops`` False) it is traced once; with dropout, the second trace has keys that recorded runs
    have.
    """
    return nn.scan(
        block,
        variable_broadcast=STACKS,
        variable_axes=dict.fromkeys(
            ("params", "lora", "gate_mask", "gate_taps", PREACTIVATIONS, ROUTING), 0
        ),
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=n_layers,
        check_constancy_invariants=drops,
    )


def _policy(remat: str) -> Callable[..., Any]:
    """Returns the policy of `jax.checkpoint`; all save a layer's input and the sums of its
    statistics."""
    saved = _SAVES[remat.removesuffix(OFFLOAD)]
    policies = jax.checkpoint_policies
    policy: Callable[..., Any]
    if remat.endswith(OFFLOAD):
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=(SUMS,),
            names_which_can_be_offloaded=(LAYER_INPUT, *saved),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = policies.save_only_these_names(SUMS, *saved)
        if saved:
            policy = policies.save_from_both_policies(policy, _is_cudnn_forward_pass)
    return policy


def _is_cudnn_forward_pass(primitive: Any, *_: Any, **__: Any) -> bool:
    """Returns True for the forward pass of cuDNN's attention, to whose results JAX gives no
    name."""
    return bool(primitive.name == "dot_product_attention_fwd_wrapper")
