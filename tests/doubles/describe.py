"""Writes descriptions.json: the devices of TPU slices and of GPU nodes as XLA's own compilers
describe them.

    pip install 'jax[tpu,cuda12]'
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tests/doubles/describe.py

No TPU or GPU is used. A digest is of every device's id, process, coordinates and slice, in the
order of `jax.devices`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("descriptions.json")
HOST = {"chips_per_host_bounds": (2, 4, 1)}
DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "v5e-8, one host": {"topology_name": "v5e:2x4"} | HOST,
    "v5e-8, two hosts": {"topology_name": "v5e:2x4"},
    "v5litepod-16": {"topology_name": "v5e:4x4"},
    "v6e-8": {"topology_name": "v6e:2x4"} | HOST,
    "v6e-16": {"topology_name": "v6e:4x4"},
    "v6e-256": {"topology_name": "v6e:16x16"},
    "v5p-2048": {"topology_name": "v5p:8x8x16"},
    "2 x v6e-16": {"topology_name": "v6e:4x4", "num_slices": 2},
    "1 x 8 H100": {"platform": "cuda", "topology": "1x1x8"},
    "2 x 8 H100": {"platform": "cuda", "topology": "2x1x8"},
    "2 x 8 H100, a process a GPU": {"platform": "cuda", "topology": "2x8x1"},
}


def digest(devices: Iterable[Any]) -> dict[str, Any]:
    """What identifies the devices. A description of GPUs has 0 for every domain; the coordinates
    contain it."""
    rows = []
    for device in devices:
        of_slice = getattr(device, "slice_index", None) if device.platform == "tpu" else None
        rows.append([device.id, device.process_index, list(device.coords), of_slice])
    kinds = {device.device_kind for device in devices}
    return {
        "kinds": sorted(kinds),
        "devices": len(rows),
        "processes": len({row[1] for row in rows}),
        "first": rows[:2],
        "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


def main() -> None:
    from jax.experimental import topologies

    target = (Path(__file__).parents[2] / "nalora_jax" / "planner" / "h100.txtpb").read_text()
    lines = []
    for name, options in DESCRIPTIONS.items():
        arguments = {"platform": "tpu"} | options
        if arguments["platform"] == "cuda":
            arguments |= {"topology_name": "h100", "target_config": target}
        record = digest(list(topologies.get_topology_desc(**arguments).devices))
        lines.append(f"{json.dumps(name)}: {json.dumps(record)}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
