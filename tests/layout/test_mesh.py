"""Meshes, the specs of all arrays, rows of processes, and the options that a step is compiled with."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common import trees
from nalora_jax.config import LoRAConfig, LoRARule, MeshConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.layout.distributed import compiler_options
from nalora_jax.method.transform import init_gate_state, make_mechanisms
from nalora_jax.models.adapters import adapter_shapes, adapter_spec
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.families import supported
from nalora_jax.models.stacks import param_shapes
from tests import tiny

L, F, EXPERTS = 3, 128, 2
RAW = tiny.HF | {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": False, "attention_bias": True,
}  # fmt: skip
DENSE = ModelConfig.from_hf(RAW)
MIXTURE = ModelConfig.from_hf(
    RAW | {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": 1}
)
BOTH = ("tensor", "fsdp")


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def params(base):
    return trees.unflatten({path: struct(*shape) for path, shape in param_shapes(base).items()})


def lora(base):
    return adapter_shapes(base, adapter_spec(RunConfig(lora=LoRAConfig(rules=(LoRARule("", 8),))), base))


def specs(tree, mesh, rules):
    placed = trees.flatten(distributed.shardings(tree, mesh, rules))
    return {path: sharding.spec for path, sharding in placed.items()}


@pytest.fixture(params=[(2, 4, 1), (1, 2, 4)], ids=lambda sizes: "x".join(map(str, sizes)))
def mesh(request):
    return distributed.make_mesh(MeshConfig(*request.param))


def test_axes_are_auto_and_minus_one_takes_what_is_left():
    mesh = distributed.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert distributed.make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(3, 1, 1), "8 device.*data 3 x fsdp 1 x tensor 1"),
        (MeshConfig(-1, 3, 1), "divides the 8 device"),
        (MeshConfig(-1, -1, 1), "at most one axis of -1"),
        (MeshConfig(1, -3, 1), "axis sizes of 1 or more"),
        (MeshConfig(run=3), r"--mesh.run: expected a divisor of the 8 device.*1, 2, 4, 8, found 3"),
    ],
)
def test_wrong_products_are_refused(config, message):
    with pytest.raises(NaloraError, match=message):
        distributed.make_mesh(config)


def test_weight_specs_by_path(mesh):
    placed = specs(params(DENSE), mesh, distributed.PARAM_RULES)
    expected = {
        "embed/embedding": P("tensor", "fsdp"),
        "lm_head/kernel": P("fsdp", "tensor"),
        "layers/attn_norm/scale": P(),
        "layers/attn/q_proj/kernel": P(None, "fsdp", "tensor"),
        "layers/attn/q_proj/bias": P(None, "tensor"),
        "layers/attn/o_proj/kernel": P(None, "tensor", "fsdp"),
        "layers/ffn/gate_proj/kernel": P(None, "fsdp", "tensor"),
        "layers/ffn/down_proj/kernel": P(None, "tensor", "fsdp"),
    }
    assert {path: placed[path] for path in expected} == expected
    # fsdp splits experts by their number if it divides it.
    placed = specs(params(MIXTURE), mesh, distributed.PARAM_RULES)
    inner = EXPERTS % mesh.shape["fsdp"] > 0
    split = P(None, None, "tensor", "fsdp") if inner else P(None, "fsdp", "tensor")
    assert placed["layers/ffn/down_proj/kernel"] == split
    assert placed["layers/ffn/router/kernel"] == P(None, "fsdp")


def test_adapters_are_split_like_the_weight_that_they_adapt(mesh):
    """Within a step like the weight over tensor, and whole over fsdp; between steps also over fsdp."""
    expected = {
        "layers/attn/q_proj/a": (P(None, "fsdp"), P()),
        "layers/attn/q_proj/b": (P(None, None, BOTH), P(None, None, "tensor")),
        "layers/ffn/down_proj/a": (P(None, BOTH), P(None, "tensor")),
        "layers/ffn/down_proj/b": (P(None, None, "fsdp"), P()),
    }
    for base in (DENSE, MIXTURE):
        between, within = (
            specs(lora(base), mesh, rules) for rules in (distributed.STATE_RULES, distributed.STEP_RULES)
        )
        for path, wanted in expected.items():
            # Experts have one axis more, after the layers.
            experts = (None,) * (base is MIXTURE and "/ffn/" in path)
            wanted = tuple(P(*spec[:1], *experts, *spec[1:]) if spec else spec for spec in wanted)
            assert (between[path], within[path]) == wanted, path


def test_gate_state_follows_the_gates_channels(mesh):
    shapes = {"layers/ffn": (L, F), "layers/moe": (L, EXPERTS, F)}
    mechanisms = make_mechanisms(("soft:power=2", "homogeneity"), activation="silu")
    state = {
        "gate": jax.eval_shape(lambda: init_gate_state(shapes, mechanisms)),
        "gate_taps": {"layers": {"ffn": {"tokens": struct(L), "delta": struct(L, F)}}},
        "gate_mask": {"layers": {"ffn": {"mask": struct(L, F)}}},
        "step": struct(),
    }
    placed = specs(state, mesh, distributed.STATE_RULES)
    expected = {
        "gate/memory/mask/layers/ffn/slope": P(None, BOTH),
        "gate_taps/layers/ffn/delta": P(None, BOTH),
        "gate/memory/step_scale/layers/ffn/occupancy": P(None, None, BOTH),
        "gate/memory/step_scale/layers/moe/occupancy": P(None, None, None, BOTH),
        "gate_mask/layers/ffn/mask": P(None, BOTH),
    }
    expected |= dict.fromkeys(
        ("gate/updates/layers/ffn", "gate/count", "gate_taps/layers/ffn/tokens", "step"), P()
    )
    assert {path: placed[path] for path in expected} == expected


def test_every_array_is_covered_or_named():
    mesh, tree = distributed.make_mesh(MeshConfig()), {"vision": {"patch": struct(8, 8)}}
    with pytest.raises(NaloraError, match="vision/patch"):
        distributed.shardings(tree, mesh, distributed.PARAM_RULES)
    assert specs(tree, mesh, [*distributed.PARAM_RULES, ("", P())]) == {"vision/patch": P()}


def test_a_dimension_that_does_not_divide_is_replicated_alone():
    mesh = distributed.make_mesh(MeshConfig(1, 2, 4))
    for spec, shape, fitted in (
        (P("fsdp", "tensor"), (3, 64, 126), P(None, "fsdp")),
        (P("fsdp", "tensor"), (3, 63, 128), P(None, None, "tensor")),
        (P(("data", "fsdp"), None), (6, 5), P(("data", "fsdp"))),
        (P(BOTH), (12,), P("tensor")),
        (P(None, "tensor"), (128,), P()),
    ):
        assert distributed.fit_spec(spec, shape, mesh) == fitted


def test_heads_that_tensor_does_not_divide_are_refused_by_name():
    distributed.check_heads(4, n_heads=8, n_kv_heads=4)
    message = r"--mesh.tensor.*9 query heads and 3 key/value heads.*found 4; use 1 or 3"
    with pytest.raises(NaloraError, match=message):
        distributed.check_heads(4, n_heads=9, n_kv_heads=3)
    with pytest.raises(NaloraError, match="8 query heads and 2 key/value heads"):
        distributed.check_heads(4, n_heads=8, n_kv_heads=2)


# ---------------------------------------------------------------- processes

CLUSTER = (
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE",
    "TPU_WORKER_HOSTNAMES", "TPU_ML_PLATFORM", "TPU_SKIP_MDS_QUERY", "MEGASCALE_NUM_SLICES",
)  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """A single machine's environment, and the arguments with which jax.distributed.initialize was called."""
    for name in CLUSTER:
        monkeypatch.delenv(name, raising=False)
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: seen.append(arguments))
    return seen


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (None, None)),
        # Two slices of one host on GKE.
        (
            {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2", "TPU_SKIP_MDS_QUERY": "true"},
            (None, None),
        ),
        ({"SLURM_STEP_NUM_TASKS": "4"}, (None, None)),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            (2, 1),
        ),
    ],
)
def test_many_hosts_are_recognised_from_the_environment(calls, monkeypatch, environment, processes):
    assert distributed.initialize_distributed() is False
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.initialize_distributed() is True
    (call,) = calls  # none for the single machine
    assert (call["num_processes"], call["process_id"]) == processes
    assert call["heartbeat_timeout_seconds"] <= 60  # a lost peer is found within two minutes


def test_an_incomplete_environment_is_named(calls, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(NaloraError, match=r"JAX_NUM_PROCESSES: expected a whole number, found 'two'"):
        distributed.initialize_distributed()


@pytest.mark.parametrize("lead", [(), (3,)])
def test_rows_go_to_their_devices_in_any_order_of_devices(lead):
    devices = np.array(jax.devices())[[5, 0, 3, 6, 1, 7, 2, 4]].reshape(2, 2, 2)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    tokens = np.random.default_rng(0).integers(0, 99, (*lead, 8, 6))
    placed = distributed.make_global_batch({"tokens": tokens}, mesh, rows_axis=len(lead))["tokens"]
    np.testing.assert_array_equal(placed, tokens)
    np.testing.assert_array_equal(distributed.process_rows(mesh, 8), np.arange(8))
    expected = jax.device_put(tokens, NamedSharding(mesh, P(*[None] * len(lead), ("data", "fsdp"))))
    for one, other in zip(placed.addressable_shards, expected.addressable_shards, strict=True):
        assert one.device == other.device
        np.testing.assert_array_equal(one.data, other.data)


# ---------------------------------------------------------------- options of the compiler

FUSED = "xla_tpu_enable_async_collective_fusion"
OFFLOADED = "xla_tpu_enable_sparse_core_collective_offload_all_gather"


def options(platform: str, kind: str, fsdp: int) -> dict[str, object]:
    device = SimpleNamespace(platform=platform, device_kind=kind)
    return compiler_options(SimpleNamespace(shape={"fsdp": fsdp}, devices=np.array([device])))


def test_options_are_the_platform_s_and_for_gathers_where_there_are_any():
    assert options("tpu", "TPU v6 lite", 1) == options("tpu", "TPU v9", 8) == options("cpu", "cpu", 8) == {}
    whole, split = (options("gpu", "NVIDIA H100", fsdp) for fsdp in (1, 8))
    assert all(name.startswith("xla_gpu") for name in split)
    assert whole.items() < split.items()
    # Options come and go with JAX's versions, and one that XLA does not know is an error when a run compiles its step.
    jax.jit(lambda: 0.0, compiler_options=split).lower().compile()
    assert sum("pipeline" in name for name in split) == 1
    # libtpu refuses fused collectives elsewhere, for wrong results and hangs; those have SparseCores.
    assert FUSED in options("tpu", "TPU v5 lite", 8)
    for kind in ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e"):
        assert OFFLOADED in options("tpu", kind, 8)
        assert FUSED not in options("tpu", kind, 8)


# Defaults of transformers that no model has: 96 heads do not divide the width.
SIZES = {"glm4_moe": {"head_dim": 128}}


@pytest.mark.parametrize("family", supported())
def test_every_weight_of_every_family_has_a_rule_and_every_large_one_is_split(family):
    raw = transformers.AutoConfig.for_model(family, **SIZES.get(family, {})).to_dict()
    base, mesh = ModelConfig.from_hf(raw), distributed.make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    placed, shapes = specs(params(base), mesh, distributed.PARAM_RULES), param_shapes(base)
    whole = [path for path, spec in placed.items() if spec == P()]
    assert all(math.prod(shapes[path][1:]) < 2**16 for path in whole), whole  # values per layer
