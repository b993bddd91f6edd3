"""What ``nalora plan`` says of a compiled program."""

from __future__ import annotations

from typing import Any

from nalora_jax.config import LoRAConfig, RunConfig, TrainConfig
from nalora_jax.models.config import projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.plan.figures import Figures
from nalora_jax.plan.layouts import estimate
from nalora_jax.plan.machines import topology
from nalora_jax.plan.models import architecture
from nalora_jax.plan.report import Plan, describe
from nalora_jax.plan.roofline import roofline
from nalora_jax.plan.transfers import Transfer


def planned(kernels: dict[str, float], **more: Any) -> Plan:
    base, machine = architecture("llama-3.1-8b"), topology("v6e:16x16")
    config = RunConfig(train=TrainConfig(batch_size=256))
    spec = resolve(LoRAConfig(), projection_shapes(base), base.n_layers)
    layout = estimate(config, base, spec, machine, 4096, (256, 1, 1), "dots")
    found = Figures(16e9, 12e9, 1e14, 1e11, kernels, (), **more)
    bound = roofline(found, machine, base, spec, 256, 4096)
    return Plan("llama-3.1-8b", machine, layout, 256, 4096, 1, found, found, bound)


def test_kernels_are_named_with_their_numbers():
    kernels = {"splash_mha_fwd_segmented_residuals": 32.0, "splash_mha_dkv_segmented": 32.0}
    plan = planned(kernels)
    assert plan.to_dict()["kernels"] == kernels
    (line,) = (line for line in describe(plan) if line.startswith("  kernels"))
    assert line == "  kernels     splash_mha_dkv_segmented x 32, splash_mha_fwd_segmented_residuals x 32"
    assert not [line for line in describe(planned({})) if line.startswith("  kernels")]


def test_what_waits_in_the_host_s_memory_has_a_roofline_of_its_own():
    moved = (Transfer(True, 1e9, 32.0, True), Transfer(False, 1e9, 32.0, False))
    plan = planned({}, host=32e9, transfers=moved)
    lines = [line for line in describe(plan) if line.startswith("  host")]
    assert lines == [
        "  host        32.00 GB a chip of 180 (32.00 GB out and 32.00 back a step)",
        "  host link   1000 ms behind products, 1000 ms not, at 32 GB/s (jax-ml.github.io/scaling-book/tpus)",
    ]
    assert plan.bound.seconds == 1.0 + 1.0
    assert plan.fits
    assert not planned({}, host=200e9, transfers=moved).fits
    assert not [line for line in describe(planned({})) if line.startswith("  host")]
