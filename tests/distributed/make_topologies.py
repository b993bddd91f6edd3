"""Writes topologies.json: which process holds each device of a mesh on TPU topologies, by the TPU's own compiler.

    pip install 'jax[tpu]'
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tests/distributed/make_topologies.py

No TPU is used. An entry holds the axis sizes of a mesh and the process of each of its devices, in the mesh's order.
"""

from __future__ import annotations

import json
from pathlib import Path

from jax.experimental import topologies

from nalora_jax import distributed
from nalora_jax.config import MeshConfig

# (topology, data, fsdp, tensor)
MESHES = [
    ("v5e:4x4", 1, 16, 1),
    ("v5e:4x8", 2, 8, 2),
    ("v5e:16x16", 16, 16, 1),
    ("v6e:8x16", 1, 128, 1),
    ("v6e:16x16", 1, 256, 1),
    ("v6e:16x16", 256, 1, 1),
    ("v6e:16x16", 4, 32, 2),
    ("v5p:4x4x4", 1, 64, 1),
    ("v5p:8x8x16", 4, 64, 4),
    ("v6e:4x8", 4, 8, 1),
]
FILE = Path(__file__).with_name("topologies.json")


def main() -> None:
    lines = []
    for topology, *sizes in MESHES:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        mesh = distributed.make_mesh(MeshConfig(*sizes), list(devices))
        processes = [device.process_index for device in mesh.devices.flat]
        lines.append(json.dumps({"topology": topology, "sizes": sizes, "processes": processes}))
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
