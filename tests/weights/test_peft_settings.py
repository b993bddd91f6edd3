"""Settings of PEFT: every field is carried over, refused or named, and adapters are those that PEFT
would make."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest

from nalora_jax.__main__ import main
from nalora_jax.cli.config_files import settings_of
from nalora_jax.config import AdaLoRAConfig, check
from nalora_jax.errors import NaloraError
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.weights.peft_import import import_adapter
from nalora_jax.weights.peft_settings import PEFT, convert_peft_config
from tests.weights.conftest import COMMON

DOCS = Path(__file__).parents[2] / "docs"
LLAMA = COMMON | {"model_type": "llama"}


def settings_in(theirs: Any) -> dict[str, Any]:
    """A configuration of PEFT as its file has it."""
    return json.loads(json.dumps(theirs.to_dict(), default=sorted))


def test_every_field_of_peft_is_in_the_table():
    assert {one.name for one in dataclasses.fields(peft.LoraConfig)} == set(PEFT)


@pytest.mark.parametrize("name", PEFT)
def test_the_page_says_what_becomes_of_every_field(name):
    page, field = (DOCS / "from_peft.md").read_text(encoding="utf-8"), PEFT[name]
    *_, ignored = page.partition("Left out, since they do not change the training here: ")
    if field.ours:
        assert f"| `{name}` | `{field.ours}` |" in page
    elif field.ignored:
        assert f"`{name}`" in ignored.partition("\n\n")[0]
    else:
        reason = re.escape(field.value(object()).reason)  # a value that no field accepts
        assert re.search(rf"^- .*`{name}`.*: {reason}$", page, re.MULTILINE)


ON_STACKS = {"r": 4, "lora_alpha": 8, "target_modules": [], "layers_to_transform": [0]}
MADE: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": "all-linear", "r": 4, "lora_alpha": 12}),
    ("llama", {"target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2},
            "use_rslora": True,
        },
    ),
    # Patterns of modules that are not targeted have no effect.
    (
        "llama",
        {
            "target_modules": ["o_proj"],
            "rank_pattern": {"up_proj": 3},
            "alpha_pattern": {"model.layers.1.self_attn.o_proj": 1.0, "v_proj": 1},
        },
    ),
    # A module has the value of the first key that its name ends with, and of each pattern by
    # itself.
    (
        "llama",
        {
            "target_modules": ["down_proj", "up_proj"],
            "rank_pattern": {"up_proj": 6, "layers.2.mlp.down_proj": 2, "layers.1.mlp.up_proj": 3},
            "alpha_pattern": {"down_proj": 2, "mlp.up_proj": 4},
        },
    ),
    ("llama", {"target_modules": ["k_proj", "up_proj"], "exclude_modules": ["k_proj"]}),
    # Settings of target_modules, such as layers_to_transform, do not apply to parameters.
    (
        "qwen2_moe",
        ON_STACKS | {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    (
        "qwen2_moe",
        ON_STACKS
        | {
            "target_parameters": ["model.layers.1.mlp.experts.down_proj"],
            "target_modules": ["q_proj"],
        },
    ),
    (
        "qwen2_moe",
        ON_STACKS
        | {
            "target_parameters": ["experts.gate_up_proj"],
            "rank_pattern": {r".*\.mlp\.experts\.gate_up_proj": 6},
        },
    ),
    (
        "qwen2_moe",
        ON_STACKS
        | {
            "target_parameters": ["down_proj"],
            "rank_pattern": {"layers.2.mlp.experts.down_proj": 2},
            "alpha_pattern": {"down_proj": 2, "mlp.down_proj": 3},
        },
    ),
]


@pytest.mark.parametrize(("family", "settings"), MADE, ids=str)
def test_the_adapters_are_those_that_peft_makes(family, settings, tiny_model):
    model, base = tiny_model(family, attention_bias=False)
    theirs, expected = peft.LoraConfig(**settings), {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(rank|alpha)_pattern", RuntimeWarning)
        injected = peft.inject_adapter_in_model(theirs, model)
    for name, module in injected.named_modules():
        if hasattr(module, "lora_A"):
            part = getattr(module, "parameter_name", name.rpartition(".")[2])
            for ours in ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,):
                expected[name.split(".")[2], ours] = (
                    module.r["default"],
                    float(module.scaling["default"]),
                )

    made, notes = convert_peft_config(settings_in(theirs))
    spec = resolve(
        settings_of(made, Path("mine.yaml")).lora, projection_shapes(base), base.n_layers
    )
    found = {
        (str(layer), path.rpartition("/")[2]): (rank, pytest.approx(scale))
        for path, target in spec.targets
        for layer, (rank, scale) in enumerate(zip(target.ranks, spec.scales(path), strict=True))
        if rank
    }
    assert found == expected
    assert not any("shared" in path for path, _ in spec.targets)
    assert not any("not known" in note for note in notes)
    assert any("layers/0/ffn/:0" in note for note in notes) == (family == "qwen2_moe")


def test_all_that_is_refused_is_named_at_once():
    bad = {
        "target_modules": ["q_proj"],
        "bias": "all",
        "use_qalora": True,
        "modules_to_save": ["norm"],
    }
    with pytest.raises(NaloraError) as caught:
        convert_peft_config(bad | {"init_lora_weights": "olora", "r": 8})
    for part in (
        "bias = 'all' (biases stay",
        "use_qalora = True (it is another",
        "modules_to_save = ['norm'] (of the base, embed_tokens and lm_head",
        "'olora' (there are",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("table", "fine"),
    [
        (PEFT, {"r": 8, "lora_alpha": 16, 5: "a key of YAML"}),
        (["tinit", "tfinal", "init_r"], {"peft_type": "ADALORA", "total_step": 9}),
    ],
    ids=["PEFT", "AdaLoRA"],
)
def test_every_value_of_every_field_is_refused_by_name_noted_or_carried_over(table, fine):
    fine = fine | {"target_modules": ["q_proj"]}
    numbers, lists = [5, 1.5, math.inf, True, 10**400], [[], [5], [["q_proj"]]]
    empty = {"q_proj": None}
    usual = convert_peft_config(fine)
    for name, value in itertools.product(table, [*numbers, *lists, "x", {"q_proj": "x"}, empty]):
        try:
            made = convert_peft_config(fine | {name: value})
        except NaloraError as error:
            refusal = str(error)
        else:
            refusal = ""
        if refusal:
            assert name in refusal
        else:
            assert made != usual or value in ([], empty), (name, value)


WHOLE = "which is trained as a whole here; .*--lora.modules-to"
STACKS = "target_parameters: expected experts.gate_up_proj"
INDICES = "trainable_token_indices"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_lora_weights": "lora_ga"}, "PEFT's scales B by the singular values"),
        ({"target_modules": None}, "target_modules: .*found none"),
        ({"target_modules": r".*\.q_proj"}, "target_modules: .*found the expression"),
        ({"target_modules": [["q_proj"]]}, r"expected a list of names, found \[\['q_proj'\]\]"),
        ({"target_modules": ["q_proj", "model.embed_tokens"]}, f"'model.embed_tokens', {WHOLE}"),
        ({"modules_to_save": 5}, r"modules_to_save = 5 \(its value has another type\)"),
        (
            {"ensure_weight_tying": True},
            "ensure_weight_tying = True .a trained embedding and its head are",
        ),
        (
            {"alpha_pattern": {"q_proj": "x"}},
            "lora_alpha or alpha_pattern: expected a number, found 'x'",
        ),
        (
            {INDICES: {"embed_tokens": [5], "lm_head": [6]}},
            f"{INDICES} = .*give both the same list",
        ),
        ({"target_parameters": ["self_attn.down_proj"]}, STACKS),
        ({"target_modules": ["other_proj"]}, "expected modules of .*found 'other_proj'"),
        (
            {"target_modules": "all-linear", "exclude_modules": ["in_proj_qkvz"]},
            "exclude_modules: expected no linear attention, next to all-linear",
        ),
    ],
    ids=str,
)
def test_a_value_that_means_nothing_here_is_named(values, message):
    with pytest.raises(NaloraError, match=message):
        convert_peft_config({"target_modules": ["q_proj"]} | values)


ADALORA = {
    "peft_type": "ADALORA",
    "init_r": 4,
    "target_r": 1,
    "lora_alpha": 12,
    "tinit": 1,
    "tfinal": 2,
}


def test_settings_of_adalora_are_taken_over_and_its_files_are_refused(tmp_path):
    theirs = peft.AdaLoraConfig(**ADALORA, total_step=8, target_modules=["q_proj"])
    values = settings_in(theirs)
    settings, notes = convert_peft_config(values)
    config = check(settings_of(settings, tmp_path))
    assert config.adalora == AdaLoRAConfig(1, 1 / 8, 2 / 8, interval=1)
    assert (config.steps, config.adalora.steps(8)) == (8, (1, 6))
    assert {(rule.rank, rule.alpha) for rule in config.lora.rules} == {(4, 12.0)}
    assert not any("not known" in note for note in notes)
    with pytest.raises(NaloraError, match="total_step"):
        convert_peft_config(values | {"total_step": None})
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(
        NaloraError, match="peft_type: expected \"LORA\", found 'ADALORA'; merge it in PEFT"
    ):
        import_adapter(tmp_path, ModelConfig.from_hf(LLAMA))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            {"modules_to_save": ["lm_head", "model.embed_tokens"]},
            (("embed_tokens", "lm_head"), (), ("embed_tokens",)),
        ),
        ({INDICES: [5, 3]}, ((), (5, 3), ("embed_tokens",))),
        ({INDICES: {"lm_head": [5], "embed_tokens": [5]}}, ((), (5,), ("embed_tokens", "lm_head"))),
        ({INDICES: []}, ((), (), ("embed_tokens",))),
    ],
)
def test_tables_and_rows_that_are_trained_are_kept(theirs, ours, tmp_path):
    made, notes = convert_peft_config(
        settings_in(peft.LoraConfig(target_modules=["q_proj"], **theirs))
    )
    lora = settings_of(made, tmp_path / "mine.yaml").lora
    assert (
        lora.modules_to_save,
        lora.trainable_token_indices,
        lora.trainable_token_modules,
    ) == ours
    named = "name them in data.add_tokens or data.add_special_tokens, in their order"
    assert any(named in note for note in notes) == bool(ours[0] or ours[1])


def test_a_folder_of_peft_is_read(tmp_path, capsys):
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    values |= {"base_model_name_or_path": "m"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    assert main(["from-peft", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "model: m\nlora:\n  rules:\n  - ffn/up_proj:4:8\n"
    (tmp_path / "other.json").write_text("{}")
    assert main(["from-peft", str(tmp_path / "other.json")]) == 2
