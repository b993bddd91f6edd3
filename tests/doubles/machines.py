"""A double of every machine that the documentation names; what its client gives and omits, the
double gives and omits.

Sources of the attributes; some machines name more:

- TPU ids, coords and processes: descriptions by libtpu 0.0.42.1, compared device by device
  (`describe.py`).
  Recorded on hardware: v6e 2x2 in jax-ml/jax#37230, v5e 2x2 in skypilot-org/skypilot#3947, several
  hosts (v4) in huggingface/transformers#20252. Several slices: ids from 100,000 on and
  ``slice_index``, jax-ml/jax#26418.
- TPU memory: vllm-project/vllm#16211 recorded 33,550,237,696 bytes on v6e; XLA's "15.75G hbm" on
  v5e; 95 GiB are allocatable on v5p (cloud.google.com/tpu/docs/v5p).
- GPU attributes: XLA, pjrt/gpu/se_gpu_topology_description.cc (`SetupDeviceDescription`). The
  domain is the rank of the fabric's UUID if all GPUs have one (NVL72), else of the boot id
  (`BuildGlobalTopology` in pjrt/distributed/topology_util.cc); ids ascend with the domain. Clients
  before XLA's partition_index give slice_index alone, and the local device as the only coordinate
  (tfrt_gpu_client.cc).
- GPU memory: `nvidia-smi`'s total, of which the client takes 75% (docs.jax.dev, GPU memory
  allocation).
- Absent attributes, and ``local_hardware_id`` of None for devices of other processes: jaxlib
  0.10.2.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from types import SimpleNamespace
from typing import Any

_GIB, _MIB = 2**30, 2**20
_CLIENTS = {
    name: SimpleNamespace(platform=name, process_index=lambda: 0) for name in ("tpu", "gpu")
}


class Device:
    """A device as process 0 sees it."""

    def __init__(self, memory: int, domain: int, **attributes: Any) -> None:
        self.__dict__.update(attributes)
        self._memory = memory
        self.true_domain = domain  # slice, node or rack, as the machine is wired
        self.client = _CLIENTS[attributes["platform"]]
        local = self.process_index == self.client.process_index()
        self.local_hardware_id = attributes["local_hardware_id"] if local else None

    def memory_stats(self) -> dict[str, int]:
        if self.local_hardware_id is None:
            raise RuntimeError("GetAllocatorStats() is allowed only for addressable devices")
        return {"bytes_limit": self._memory, "bytes_in_use": 0, "peak_bytes_in_use": 0}

    def __repr__(self) -> str:
        return f"{self.platform}:{self.id}"


def tpu(kind: str, memory: int, shape: Any, host: Any = (2, 2, 1), slices: int = 1) -> list[Device]:
    """Chips of ``slices`` slices of ``shape``, with ``host`` chips on each host."""
    devices = []
    hosts = [size // chips for size, chips in zip(shape, host, strict=True)]
    places = product(
        range(slices), *map(range, reversed(hosts))
    )  # the first coordinate runs fastest
    for process, (index, hz, hy, hx) in enumerate(places):
        for local, (z, y, x) in enumerate(product(*map(range, reversed(host)))):
            coords = [hx * host[0] + x, hy * host[1] + y, hz * host[2] + z]
            number = coords[0] + shape[0] * (coords[1] + shape[1] * coords[2])
            attributes = {"platform": "tpu", "device_kind": kind, "core_on_chip": 0, "num_cores": 1}
            attributes |= {"process_index": process, "local_hardware_id": local, "coords": coords}
            if slices > 1:
                attributes |= {"slice_index": index}
                number += 100_000 * (index + 1)
            devices.append(Device(memory, index, id=number, **attributes))
    return devices


def gpu(
    kind: str,
    memory: int,
    shape: Any,
    process_a_gpu: bool = False,
    cyclic: bool = False,
    old: bool = False,
) -> list[Device]:
    """GPUs of nodes or racks, of hosts in each, of GPUs in each (``shape``), in the order of
    `jax.devices`.

    Each host has a process, or each GPU as in deploy/slurm.sbatch; with ``cyclic`` processes go
    round the nodes (``srun --distribution=cyclic``). An old client has the attributes of XLA before
    partition_index.
    """
    devices, (domains, hosts, gpus) = [], shape
    for domain, host, local in product(*map(range, shape)):
        process, coords = domain * hosts + host, [domain, host, local]
        if process_a_gpu:
            process = local * domains * hosts + process if cyclic else process * gpus + local
            coords = [domain, host * gpus + local, 0]
        attributes: dict[str, Any] = {"coords": [local], "slice_index": domain}
        if not old:
            attributes |= {"coords": coords, "partition_index": domain, "fabric_uuid": ""}
        attributes |= {
            "platform": "gpu",
            "device_kind": kind,
            "device_vendor": "NVIDIA Corporation",
        }
        attributes |= {"id": len(devices), "process_index": process, "local_hardware_id": local}
        devices.append(Device(memory * 3 // 4, domain, **attributes))
    return sorted(devices, key=lambda device: (device.process_index, device.id))


V5E = ("TPU v5 lite", 16_911_433_728)
V6E = ("TPU v6 lite", 33_550_237_696)
V5P = ("TPU v5", 95 * _GIB)
H100 = ("NVIDIA H100 80GB HBM3", 81_559 * _MIB)
A100 = ("NVIDIA A100-SXM4-40GB", 40_960 * _MIB)
A100_80 = ("NVIDIA A100-SXM4-80GB", 81_920 * _MIB)
T4 = ("Tesla T4", 15_360 * _MIB)
GB200 = ("NVIDIA GB200", 189_471 * _MIB)  # 4 a host, 18 hosts a rack: NVIDIA/k8s-test-infra#727
_MACHINES = {
    "v5e-8, one host": partial(tpu, *V5E, (2, 4, 1), (2, 4, 1)),  # ct5lp-hightpu-8t
    "v5e-8, two hosts": partial(tpu, *V5E, (2, 4, 1)),  # ct5lp-hightpu-4t, apple/axlearn#994
    "v5litepod-16": partial(tpu, *V5E, (4, 4, 1)),
    "v6e-8": partial(tpu, *V6E, (2, 4, 1), (2, 4, 1)),  # ct6e-standard-8t
    "v6e-16": partial(tpu, *V6E, (4, 4, 1)),
    "v6e-256": partial(tpu, *V6E, (16, 16, 1)),
    # Two cores a chip in the name, one device: jax-ml/jax#19493.
    "v5p-2048": partial(tpu, *V5P, (8, 8, 16)),
    "2 x v6e-16": partial(tpu, *V6E, (4, 4, 1), slices=2),
    "1 x 8 H100": partial(gpu, *H100, (1, 1, 8)),
    "2 x 8 H100": partial(gpu, *H100, (2, 1, 8)),
    "2 x 8 H100, a process a GPU": partial(gpu, *H100, (2, 1, 8), process_a_gpu=True),
    "2 x 8 H100, cyclic": partial(gpu, *H100, (2, 1, 8), process_a_gpu=True, cyclic=True),
    "2 x 8 H100, old client": partial(gpu, *H100, (2, 1, 8), process_a_gpu=True, old=True),
    "2 x 8 A100": partial(gpu, *A100, (2, 1, 8), process_a_gpu=True),
    "8 A100 80GB": partial(gpu, *A100_80, (1, 1, 8)),
    "T4": partial(gpu, *T4, (1, 1, 1)),
    "GB200 NVL72": partial(gpu, *GB200, (1, 18, 4)),
}
NAMES = tuple(_MACHINES)


@cache
def machine(name: str) -> Any:
    """The devices of a machine of `NAMES`, in the order of `jax.devices`."""
    return _MACHINES[name]()
