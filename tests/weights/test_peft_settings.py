"""Settings of PEFT: every field is carried over, refused or named, and adapters are those that PEFT would make."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nalora_jax.__main__ import main
from nalora_jax.cli.config_files import settings_of
from nalora_jax.config import AdaLoRAConfig, check
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.weights.peft import import_adapter
from nalora_jax.weights.peft_config import PEFT, Field, Refused
from nalora_jax.weights.peft_settings import from_peft, rules_of
from tests.weights.conftest import COMMON


def text_of(fields: Mapping[str, Field]) -> Iterator[str]:
    """Yields the lines of the page: a table of converted fields, then refused and ignored fields."""
    yield "| field | here | |"
    yield "|---|---|---|"
    refused: dict[str, list[str]] = {}
    for name, field in fields.items():
        if field.ours:
            yield f"| `{name}` | `{field.ours}` | {field.note} |"
        elif not field.ignored:
            refusal = field.value(object())  # a value that no field accepts
            assert isinstance(refusal, Refused)
            refused.setdefault(refusal.reason, []).append(f"`{name}`")
    yield ""
    yield "Refused, unless they have PEFT's default:"
    yield ""
    for reason, names in refused.items():
        yield f"- {', '.join(names)}: {reason}"
    yield ""
    ignored = [f"`{name}`" for name, field in fields.items() if field.ignored]
    yield f"Left out, since they do not change the training here: {', '.join(ignored)}."


DOCS = Path(__file__).parents[2] / "docs"
LLAMA = COMMON | {"model_type": "llama"}


def test_every_field_of_peft_is_in_the_table() -> None:
    peft = pytest.importorskip("peft")
    assert {one.name for one in dataclasses.fields(peft.LoraConfig)} == set(PEFT)


def test_the_page_lists_every_field() -> None:
    assert "\n".join(text_of(PEFT)) in (DOCS / "from_peft.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "r": 4, "lora_alpha": 12},
        {"target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}, "use_rslora": True},
        {"target_modules": ["o_proj"], "alpha_pattern": {"model.layers.1.self_attn.o_proj": 1.0}},
        {"target_modules": ["k_proj", "up_proj"], "exclude_modules": ["k_proj"]},
    ],
)
def test_the_adapters_are_those_that_peft_makes(settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    theirs = peft.LoraConfig(**settings)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))
    expected = {}
    for name, module in peft.inject_adapter_in_model(theirs, model).named_modules():
        if hasattr(module, "lora_A"):
            path = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
            expected[path.replace(".", "/")] = (module.r["default"], float(module.scaling["default"]))

    made, notes = from_peft(json.loads(json.dumps(theirs.to_dict(), default=sorted)))
    base = ModelConfig.from_hf(LLAMA)
    spec = resolve(settings_of(made, Path("mine.yaml")).lora, projection_shapes(base), base.n_layers)
    found = {}
    for target, adapter in spec.targets:
        for layer in range(base.n_layers):
            if adapter.ranks[layer]:
                found[target.replace("layers/", f"layers/{layer}/")] = (
                    adapter.ranks[layer],
                    adapter.alphas[layer],
                )
    assert found.keys() == expected.keys()
    for name, (rank, scale) in expected.items():
        assert found[name][0] == rank
        assert found[name][1] / (rank**0.5 if theirs.use_rslora else rank) == pytest.approx(scale)
    assert not [note for note in notes if "not known" in note]


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"target_parameters": ["model.layers.1.mlp.experts.down_proj"], "target_modules": ["q_proj"]},
        {
            "target_parameters": ["experts.gate_up_proj"],
            "rank_pattern": {r".*\.mlp\.experts\.gate_up_proj": 6},
        },
        {"target_parameters": ["down_proj"], "alpha_pattern": {"down_proj": 2, "mlp.down_proj": 3}},
        {"target_parameters": ["experts.down_proj"], "rank_pattern": {"layers.2.mlp.experts.down_proj": 2}},
    ],
)
def test_stacks_of_experts_are_those_that_peft_targets(settings, family, tiny_model) -> None:
    """Settings of target_modules beside them, such as exclude_modules, do not apply to parameters."""
    peft = pytest.importorskip("peft")
    model, base = tiny_model(family)
    theirs = {"target_modules": [], "r": 4, "lora_alpha": 8, "exclude_modules": ["experts"]} | settings
    theirs |= {"layers_to_transform": [0]}
    expected = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(rank|alpha)_pattern", RuntimeWarning)
        injected = peft.inject_adapter_in_model(peft.LoraConfig(**theirs), model)
    for name, module in injected.named_modules():
        if hasattr(module, "parameter_name"):
            layer = name.split(".")[2]
            for part in {"gate_up_proj": ("gate_proj", "up_proj")}.get(
                module.parameter_name, ("down_proj",)
            ):
                expected[layer, part] = (module.r["default"], float(module.scaling["default"]))

    settings_, notes = from_peft(json.loads(json.dumps(theirs)) | {"exclude_modules": None})
    lora = settings_of(settings_, Path("mine.yaml")).lora
    spec = resolve(lora, projection_shapes(base), base.n_layers)
    found = {
        (str(layer), path.rpartition("/")[2]): (rank, alpha / rank)
        for path, target in spec.targets
        for layer, (rank, alpha) in enumerate(zip(target.ranks, target.alphas, strict=True))
        if rank and "ffn" in path
    }
    assert not any("shared" in path for path, _ in spec.targets)
    assert found == expected
    assert any("layers/0/ffn/:0" in note for note in notes)


def test_patterns_of_modules_that_are_not_targeted_mean_nothing() -> None:
    patterns = {"rank_pattern": {"up_proj": 3, "q_proj": 4}, "alpha_pattern": {"v_proj": 1}}
    found = rules_of({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **patterns})
    assert found == ["attn/q_proj:4:16", "attn/q_proj:8:16"]


def test_what_is_refused_is_named_with_the_reason() -> None:
    bad = {"target_modules": ["q_proj"], "bias": "all", "use_qalora": True, "modules_to_save": ["norm"]}
    with pytest.raises(NaloraError) as caught:
        from_peft(bad | {"init_lora_weights": "olora", "r": 8})
    for part in (
        "bias = 'all' (biases stay",
        "use_qalora = True (it is another",
        "modules_to_save = ['norm'] (of the base, embed_tokens and lm_head",
        "'olora' (there are",
    ):
        assert part in str(caught.value)
    with pytest.raises(NaloraError, match="PEFT's scales B by the singular values"):
        from_peft({"target_modules": ["q_proj"], "init_lora_weights": "lora_ga"})
    for targets, said in [
        (None, "found none"),
        (r".*\.q_proj", "found the expression"),
        (["c_attn"], "found 'c_attn'"),
    ]:
        with pytest.raises(NaloraError, match=f"target_modules: .*{said}"):
            from_peft({"target_modules": targets})


@pytest.mark.parametrize(
    ("convert", "table", "fine"),
    [
        (from_peft, PEFT, {"r": 8, "lora_alpha": 16, 5: "a key of YAML"}),
        (from_peft, ["tinit", "tfinal", "init_r"], {"peft_type": "ADALORA", "total_step": 9}),
    ],
    ids=["PEFT", "AdaLoRA"],
)
def test_no_value_of_any_field_is_another_error(convert: Any, table: Any, fine: dict[str, Any]) -> None:
    fine = fine | {"target_modules": ["q_proj"]}
    values = [
        5,
        1.5,
        math.inf,
        True,
        "x",
        [],
        [5],
        [["q_proj"]],
        {"q_proj": "x"},
        {"q_proj": None},
        10**400,
    ]
    for name, value in itertools.product(table, values):
        with contextlib.suppress(NaloraError):
            convert(fine | {name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modules_to_save": 5}, r"modules_to_save = 5 \(its value has another type\)"),
        ({"target_modules": 5}, "target_modules: expected a list of names, found 5"),
        (
            {"target_modules": [["q_proj"]]},
            r"target_modules: expected a list of names, found \[\['q_proj'\]\]",
        ),
        ({"lora_alpha": "16"}, "lora_alpha or alpha_pattern: expected a number, found '16'"),
        ({"alpha_pattern": {"q_proj": "x"}}, "lora_alpha or alpha_pattern: expected a number, found 'x'"),
        ({"alpha_pattern": 5}, "alpha_pattern: expected values by name, found 5"),
        ({"layers_to_transform": ["x"]}, r"layers_to_transform: expected layer numbers, found \['x'\]"),
        *(
            (
                {"target_modules": ["q_proj", name]},
                rf"'{name}', which is trained as a whole here; .*--lora.modules-to",
            )
            for name in ("lm_head", "model.embed_tokens")
        ),
        *(
            ({"trainable_token_indices": theirs}, f"trainable_token_indices = .*{said}")
            for theirs, said in (
                ({"embed_tokens": [5], "lm_head": [6]}, "give both the same list"),
                ({"wte": [5]}, "other modules are not"),
                (5, "token ids are given as a list"),
            )
        ),
        *(
            ({"target_parameters": [name]}, "target_parameters: expected experts.gate_up_proj")
            for name in ("mlp.gate.weight", "mlp.experts.gate_up_proj_bias", "self_attn.down_proj")
        ),
    ],
    ids=str,
)
def test_a_value_that_means_nothing_here_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(NaloraError, match=message):
        from_peft({"target_modules": ["q_proj"]} | values)


ADALORA = {"peft_type": "ADALORA", "init_r": 4, "target_r": 1, "lora_alpha": 12, "tinit": 1, "tfinal": 2}


def test_settings_of_adalora_are_taken_over_and_its_files_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.AdaLoraConfig(**ADALORA, total_step=8, target_modules=["q_proj"])
    values = json.loads(json.dumps(theirs.to_dict(), default=sorted))
    settings, notes = from_peft(values)
    config = check(settings_of(settings, tmp_path))
    assert config.adalora == AdaLoRAConfig(1, 1 / 8, 2 / 8, interval=1)
    assert (config.steps, config.adalora.steps(8)) == (8, (1, 6))
    assert {(rule.rank, rule.alpha) for rule in config.lora.rules} == {(4, 12.0)}
    assert not any("not known" in note for note in notes)
    with pytest.raises(NaloraError, match="total_step"):
        from_peft(values | {"total_step": None})
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(
        NaloraError, match="peft_type: expected \"LORA\", found 'ADALORA'; merge it in PEFT"
    ):
        import_adapter(tmp_path, ModelConfig.from_hf(LLAMA))


def test_tables_that_are_trained_as_a_whole_are_kept(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "model.embed_tokens"])
    made, notes = from_peft(json.loads(json.dumps(theirs.to_dict(), default=sorted)))
    assert settings_of(made, tmp_path / "mine.yaml").lora.modules_to_save == ("embed_tokens", "lm_head")
    assert "name them in data.add_tokens or data.add_special_tokens, in their order" in notes[-1]
    with pytest.raises(
        NaloraError, match="ensure_weight_tying = True .a trained embedding and its head are apart"
    ):
        from_peft({"target_modules": ["q_proj"], "ensure_weight_tying": True})


@pytest.mark.parametrize(
    ("theirs", "ids", "tables"),
    [
        ([5, 3], (5, 3), ("embed_tokens",)),
        ({"model.embed_tokens": [5, 3]}, (5, 3), ("embed_tokens",)),
        ({"lm_head": [5], "embed_tokens": [5]}, (5,), ("embed_tokens", "lm_head")),
        ({"lm_head": [7]}, (7,), ("lm_head",)),
        ([], (), ("embed_tokens",)),
    ],
)
def test_rows_that_are_trained_are_kept(theirs: Any, ids: Any, tables: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    given = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=theirs)
    made, _ = from_peft(json.loads(json.dumps(given.to_dict(), default=sorted)))
    lora = check(settings_of(made, tmp_path / "mine.yaml")).lora
    assert (lora.trainable_token_indices, lora.trainable_token_modules) == (ids, tables)


def test_a_folder_of_peft_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["up_proj"],
        "base_model_name_or_path": "m",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    assert main(["from-peft", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "model: m\nlora:\n  rules:\n  - ffn/up_proj:4:8\n"
    (tmp_path / "other.json").write_text("{}")
    assert main(["from-peft", str(tmp_path / "other.json")]) == 2
