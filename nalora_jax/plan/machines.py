"""What accelerators can do, from their makers' data sheets, and topologies of them that a program is compiled for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from nalora_jax.errors import NaloraError


@dataclass(frozen=True)
class Chip:
    """One accelerator. Rates are a second, one way; bytes are decimal."""

    name: str
    platform: str  # "tpu" or "gpu"
    flops: float  # dense bf16
    memory: float  # bytes of HBM that a program can have
    bandwidth: float  # bytes of HBM
    interconnect: float  # bytes that reach one chip from its neighbours
    network: float  # bytes that reach one chip from another slice or node
    host_memory: float  # bytes of its host's memory for each chip
    host_link: float  # bytes between HBM and the host's memory
    source: str
    host_source: str

    @property
    def matrix_rate(self) -> float:
        """Flops that products of a model's size reach, as every estimate here takes it: 75% of the peak."""
        return 0.75 * self.flops


# TPU: https://cloud.google.com/tpu/docs/v5e, .../v6e, .../v5p (bidirectional interconnect bandwidth, halved); what XLA
# reserves of HBM is taken off. GPU: NVIDIA's data sheet of the H100 SXM, NVLink 900 GB/s both ways, ConnectX-7 at
# 400 Gb/s; JAX preallocates 92% of the memory at most. Hosts: the memory of the virtual machines that Google rents with
# them (TPU pages, "VM types"; a3-highgpu-8g), and PCIe, for TPUs as the JAX team's book gives it (jax-ml.github.io/
# scaling-book/tpus), for the H100 half of its data sheet's 128 GB/s both ways.
_CLOUD = "cloud.google.com/tpu/docs"
_BOOK = "jax-ml.github.io/scaling-book/tpus"
CHIPS = {
    "v5e": Chip(
        "TPU v5e", "tpu", 197e12, 15.75 * 2**30, 819e9, 100e9, 6.25e9, 48e9, 15e9, f"{_CLOUD}/v5e", _BOOK
    ),
    "v6e": Chip(
        "TPU v6e", "tpu", 918e12, 31.25 * 2**30, 1640e9, 224e9, 12.5e9, 180e9, 32e9, f"{_CLOUD}/v6e", _BOOK
    ),
    "v5p": Chip("TPU v5p", "tpu", 459e12, 95.0e9, 2765e9, 300e9, 12.5e9, 112e9, 15e9, f"{_CLOUD}/v5p", _BOOK),
    "h100": Chip(
        "NVIDIA H100 SXM", "gpu", 989e12, 79.0e9 * 0.92, 3350e9, 450e9, 50e9, 234e9, 64e9,
        "NVIDIA H100 data sheet", "NVIDIA H100 data sheet",
    ),
}  # fmt: skip
_GPUS_A_NODE = 8
# What JAX calls them (`jax.Device.device_kind`), in lower case.
_KINDS = {
    "v5e": ("tpu v5 lite", "tpu v5e"),
    "v6e": ("tpu v6 lite", "tpu v6e"),
    "v5p": ("tpu v5p", "tpu v5"),
    "h100": ("h100",),
}


@dataclass(frozen=True)
class Topology:
    """Chips that run one program."""

    name: str  # as the user wrote it
    chip: Chip
    kind: str  # the key of `CHIPS`
    dims: tuple[int, ...]  # TPU: the torus of one slice; GPU: nodes, GPUs a node
    slices: int = 1

    @property
    def size(self) -> int:
        """Chips."""
        return math.prod(self.dims) * self.slices

    def inbound(self, devices: int) -> float:
        """Bytes a second that reach each chip in a collective of ``devices`` neighbours.

        On a torus a collective uses the links of the dimensions that its chips span. Between GPU nodes every byte comes
        in once and is passed on inside, so that the network of all GPUs of a node adds up.
        """
        if self.chip.platform == "gpu":
            nodes = devices > _GPUS_A_NODE
            return min(self.chip.interconnect, _GPUS_A_NODE * self.chip.network) if nodes else self.chip.interconnect
        if devices > math.prod(self.dims):
            return self.chip.network
        spanned, reached = 0, 1
        for size in sorted(self.dims, reverse=True):
            if reached < devices:
                reached, spanned = reached * size, spanned + 1
        wide = sum(size > 1 for size in self.dims)
        return self.chip.interconnect * max(spanned, 1) / max(wide, 1)


def topology(name: str) -> Topology:
    """The machine that a user names: ``v6e:16x16``, ``2xv6e:16x16`` (two slices), ``8xh100``.

    Raises:
      NaloraError: an unknown chip or a shape that cannot be read.
    """
    gpus = re.fullmatch(r"(\d+)x(h100)", name.lower())
    if gpus:
        count = int(gpus.group(1))
        if count and (count <= _GPUS_A_NODE or count % _GPUS_A_NODE == 0):
            a_node = min(count, _GPUS_A_NODE)
            return Topology(name, CHIPS["h100"], "h100", (count // a_node, a_node))
    tpus = re.fullmatch(r"(?:(\d+)x)?(v5e|v6e|v5p):(\d+(?:x\d+){1,2})", name.lower())
    if tpus:
        dims = tuple(int(size) for size in tpus.group(3).split("x"))
        if all(dims) and tpus.group(1) != "0":
            return Topology(name, CHIPS[tpus.group(2)], tpus.group(2), dims, int(tpus.group(1) or 1))
    raise NaloraError(
        "--topology",
        expected="a TPU topology such as v5e:16x16, v6e:16x16, v5p:8x8x16 or 2xv6e:16x16 (two slices), or GPUs such as "
        "8xh100 or 64xh100 (whole nodes of 8)",
        found=repr(name),
    )


def of_devices(devices: Sequence[jax.Device]) -> Topology | None:
    """The machine that real (or abstract) devices are; None for one that the table of chips does not know."""
    kind = next((key for key, names in _KINDS.items() if any(n in devices[0].device_kind.lower() for n in names)), None)
    if kind is None:
        return None
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if CHIPS[kind].platform == "gpu":
        nodes = len({device.process_index for device in devices})
        a_node = len(devices) // nodes
        shape = (nodes, a_node) if nodes * a_node == len(devices) else (1, len(devices))
    else:
        first = [d.coords for d in devices if getattr(d, "slice_index", 0) == getattr(devices[0], "slice_index", 0)]
        shape = tuple(max(axis) - min(axis) + 1 for axis in zip(*first, strict=True))
    return Topology(f"{len(devices)} x {CHIPS[kind].name}", CHIPS[kind], kind, shape, slices)
