from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nalora_jax.common import trees
from nalora_jax.config import LoRAConfig, LoRARule, MeshConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.layout import distributed
from nalora_jax.method.transform import init_gate_state, make_mechanisms
from nalora_jax.models.adapters import adapter_shapes, adapter_spec
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import param_shapes
from tests import tiny
from tests.doubles.machines import V5E, V5P, V6E, tpu

L, F, EXPERTS = 3, 128, 2
RAW = tiny.HF | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
MIXTURE = {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": 1}


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def base(moe: bool = False):
    return ModelConfig.from_hf(RAW | (MIXTURE if moe else {}))


def params(moe: bool = False):
    return trees.unflatten({path: struct(*shape) for path, shape in param_shapes(base(moe)).items()})


def lora(moe: bool = False):
    config = RunConfig(lora=LoRAConfig(rules=(LoRARule("", 8),)))
    return adapter_shapes(base(moe), adapter_spec(config, base(moe)))


def specs(tree, mesh, rules):
    return {
        path: sharding.spec
        for path, sharding in trees.flatten(distributed.shardings(tree, mesh, rules)).items()
    }


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
    ],
)
def test_wrong_products_are_refused(config, message):
    with pytest.raises(NaloraError, match=message):
        distributed.make_mesh(config)


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("embed/embedding", P("tensor", "fsdp")),
        ("lm_head/kernel", P("fsdp", "tensor")),
        ("layers/attn_norm/scale", P()),
        ("layers/attn/q_proj/kernel", P(None, "fsdp", "tensor")),
        ("layers/attn/q_proj/bias", P(None, "tensor")),
        ("layers/attn/o_proj/kernel", P(None, "tensor", "fsdp")),
        ("layers/ffn/gate_proj/kernel", P(None, "fsdp", "tensor")),
        ("layers/ffn/down_proj/kernel", P(None, "tensor", "fsdp")),
    ],
)
def test_weight_specs_by_path(mesh, path, spec):
    assert specs(params(), mesh, distributed.PARAM_RULES)[path] == spec


def test_fsdp_splits_experts_by_their_number_if_it_divides_it(mesh):
    weights, adapters = (
        specs(params(moe=True), mesh, distributed.PARAM_RULES),
        specs(lora(moe=True), mesh, distributed.STATE_RULES),
    )
    whole = EXPERTS % mesh.shape["fsdp"] > 0
    split = P(None, None, "tensor", "fsdp") if whole else P(None, "fsdp", "tensor")
    assert weights["layers/ffn/down_proj/kernel"] == split
    assert weights["layers/ffn/router/kernel"] == P(None, "fsdp")
    assert adapters["layers/ffn/down_proj/a"] == P(None, None, ("tensor", "fsdp"))
    assert adapters["layers/ffn/down_proj/b"] == P(None, None, None, "fsdp")


@pytest.mark.parametrize("moe", [False, True])
def test_adapters_are_split_like_the_weight_that_they_adapt(mesh, moe):
    weights = specs(
        params(), mesh, distributed.PARAM_RULES
    )  # adapters of experts follow a dense layer's weight
    between, within = (
        specs(lora(moe), mesh, rules) for rules in (distributed.STATE_RULES, distributed.STEP_RULES)
    )
    for path in (path for path in trees.flatten(params(moe)) if path.endswith("_proj/kernel")):
        rank = 4 if moe and "/ffn/" in path else 3
        full = [*weights[path], *[None] * (3 - len(weights[path]))]
        axes = {"a": full[-2], "b": full[-1]}
        for name, at in (("a", -2), ("b", -1)):
            adapter = path.replace("kernel", name)
            step, state = (
                [*spec[adapter], *[None] * (rank - len(spec[adapter]))] for spec in (within, between)
            )
            # Within a step as the weight is over tensor, and whole over fsdp; between steps over what else there is.
            assert step[at] == ("tensor" if axes[name] == "tensor" else None)
            assert state[at] == (("tensor", "fsdp") if axes[name] == "tensor" else axes[name])
            assert all(axis is None for i, axis in enumerate(step) if i != rank + at)
            assert all(axis is None for i, axis in enumerate(state) if i != rank + at)


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
    both = ("tensor", "fsdp")
    assert (
        placed["gate/memory/mask/layers/ffn/slope"] == placed["gate_taps/layers/ffn/delta"] == P(None, both)
    )
    assert placed["gate/memory/step_scale/layers/ffn/occupancy"] == P(None, None, both)
    assert placed["gate/memory/step_scale/layers/moe/occupancy"] == P(None, None, None, both)
    assert placed["gate_mask/layers/ffn/mask"] == P(None, both)
    assert placed["gate/updates/layers/ffn"] == placed["gate/count"] == P()
    assert placed["gate_taps/layers/ffn/tokens"] == placed["step"] == P()


def test_every_array_is_covered_or_named():
    mesh = distributed.make_mesh(MeshConfig())
    tree = params() | {"vision": {"patch": struct(8, 8)}}
    with pytest.raises(NaloraError, match="vision/patch"):
        distributed.shardings(tree, mesh, distributed.PARAM_RULES)
    placed = specs(tree, mesh, [*distributed.PARAM_RULES, ("", P())])
    assert placed["vision/patch"] == P()


def test_a_dimension_that_does_not_divide_is_replicated_alone():
    mesh = distributed.make_mesh(MeshConfig(1, 2, 4))
    assert distributed.fit_spec(P("fsdp", "tensor"), (3, 64, 126), mesh) == P(None, "fsdp")
    assert distributed.fit_spec(P("fsdp", "tensor"), (3, 63, 128), mesh) == P(None, None, "tensor")
    assert distributed.fit_spec(P(("data", "fsdp"), None), (6, 5), mesh) == P(("data", "fsdp"))
    assert distributed.fit_spec(P(None, "tensor"), (128,), mesh) == P()


def test_heads_that_tensor_does_not_divide_are_refused_by_name():
    distributed.check_heads(4, n_heads=8, n_kv_heads=4)
    with pytest.raises(
        NaloraError, match=r"--mesh.tensor.*9 query heads and 3 key/value heads.*found 4; use 1 or 3"
    ):
        distributed.check_heads(4, n_heads=9, n_kv_heads=3)
    with pytest.raises(NaloraError, match="8 query heads and 2 key/value heads"):
        distributed.check_heads(4, n_heads=8, n_kv_heads=2)


CLUSTER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NUM_TASKS")
CLUSTER += ("OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "TPU_ML_PLATFORM", "TPU_SKIP_MDS_QUERY")
CLUSTER += ("MEGASCALE_NUM_SLICES",)


@pytest.fixture
def calls(monkeypatch):
    """A single machine's environment, and the arguments with which jax.distributed.initialize was called."""
    for name in CLUSTER:
        monkeypatch.delenv(name, raising=False)
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: seen.append(arguments))
    return seen


def test_one_machine_needs_no_coordinator(calls):
    assert distributed.initialize_distributed() is False
    assert calls == []


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {"num_processes": None, "process_id": None}),
        # Two slices of one host on GKE.
        (
            {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2", "TPU_SKIP_MDS_QUERY": "true"},
            {"num_processes": None, "process_id": None},
        ),
        ({"SLURM_STEP_NUM_TASKS": "4"}, {"num_processes": None, "process_id": None}),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            {"num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_many_hosts_are_recognised_from_the_environment(calls, monkeypatch, environment, arguments):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.initialize_distributed() is True
    (call,) = calls
    assert {name: call[name] for name in arguments} == arguments
    assert call["heartbeat_timeout_seconds"] <= 60  # a lost peer is found within two minutes


def test_an_incomplete_environment_is_named(calls, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(NaloraError, match=r"JAX_NUM_PROCESSES: expected a whole number, found 'two'"):
        distributed.initialize_distributed()


# Kind and shape of a slice; axes data, fsdp and tensor.
MESHES = [
    (V5E, (4, 4, 1), (1, 16, 1)),
    (V6E, (16, 16, 1), (4, 32, 2)),
    (V5P, (8, 8, 16), (4, 64, 4)),
]


@pytest.mark.parametrize(("kind", "shape", "sizes"), MESHES, ids=str)
def test_every_row_of_a_pod_s_batch_is_read_once(kind, shape, sizes):
    mesh = distributed.make_mesh(MeshConfig(*sizes), tpu(*kind, shape))
    data, fsdp, tensor = sizes
    rows = 2 * data * fsdp
    held = distributed.rows_of_processes(mesh, rows)
    assert set(held) == {device.process_index for device in mesh.devices.flat}
    assert all(len(of_process) == len(set(of_process)) for of_process in held.values())
    # Every device's two rows are among those of its process, and a process reads no others.
    for part, (d, f) in enumerate(np.ndindex(data, fsdp)):
        holders = {device.process_index for device in mesh.devices[d, f]}
        assert {p for p, mine in held.items() if 2 * part in mine and 2 * part + 1 in mine} == holders
    if tensor == 1:
        np.testing.assert_array_equal(np.sort(np.concatenate(list(held.values()))), np.arange(rows))


@pytest.mark.parametrize("accumulate", [None, 3])
def test_rows_go_to_their_devices_in_any_order_of_devices(accumulate):
    devices = np.array(jax.devices())[[5, 0, 3, 6, 1, 7, 2, 4]].reshape(2, 2, 2)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    lead = () if accumulate is None else (accumulate,)
    batch = {"tokens": np.random.default_rng(0).integers(0, 99, (*lead, 8, 6))}
    placed = distributed.make_global_batch(batch, mesh, rows_axis=len(lead))["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    expected = jax.device_put(
        batch["tokens"], NamedSharding(mesh, P(*[None] * len(lead), ("data", "fsdp")))
    )
    for one, other in zip(placed.addressable_shards, expected.addressable_shards, strict=True):
        assert one.device == other.device
        np.testing.assert_array_equal(one.data, other.data)
