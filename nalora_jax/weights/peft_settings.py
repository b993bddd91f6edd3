"""The settings of PEFT's `LoraConfig` and of TRL's `SFTConfig` as those of a run: the same, renamed, or refused.

Every field of `LoraConfig` is in `PEFT`, and those of `SFTConfig` that people set are in `TRL`, so that nothing is left
out without a word. docs/from_peft.md and docs/from_trl.md are made of the same tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nalora_jax.errors import NaloraError
from nalora_jax.models.targets import ROWS, TABLES
from nalora_jax.weights.peft_adalora import training_settings
from nalora_jax.weights.peft_rules import rules_of

# Settings as nested dicts, by the names of `nalora_jax.config`.
Settings = dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """A value that means nothing here, and why."""

    reason: str


@dataclass(frozen=True)
class Field:
    """What becomes of one field."""

    ours: str = ""  # the setting, dotted; empty where there is none
    note: str = ""  # for the table
    value: Callable[[Any], Any] = lambda value: value  # ours of theirs; may be `Refused`
    ignored: bool = False  # without influence on what is trained


def _only(*fine: Any, because: str) -> Callable[[Any], Any]:
    """Refuses what is not one of ``fine``, each of which is what happens here anyway."""
    return lambda value: None if any(value == one for one in (None, *fine, {}, [])) else Refused(because)


def _choice(table: Mapping[Any, Any], because: str) -> Callable[[Any], Any]:
    return lambda value: table.get(value, Refused(because)) if isinstance(value, str) else Refused(because)


_RESIZED = (
    "if the tokenizer got new tokens: name them in data.add_tokens or data.add_special_tokens, in their order; the "
    "embedding is resized for them"
)
_OTHER_METHOD = "it is another method than LoRA, and is not implemented here"
_PISSA = re.compile(r"pissa(_niter_\d+)?")


def _init(value: Any) -> Any:
    if isinstance(value, str) and _PISSA.fullmatch(value):
        return "pissa"
    if value == "lora_ga":
        return Refused(
            "PEFT's scales B by the singular values; --lora.init lora_ga scales both sides as the paper does"
        )
    return (
        "default"
        if value in (True, None)
        else Refused("there are PEFT's default and PiSSA; gaussian and others are not made here")
    )


def _saved(value: Any) -> Any:
    names = [str(name).rpartition(".")[2] for name in value or []]
    if set(names) <= set(TABLES):
        return [name for name in TABLES if name in names] or None
    return Refused(f"of the base, {' and '.join(TABLES)} are trained as a whole; norms and the rest stay as they are")


def _indices(value: Any) -> Any:
    """The ids; the tables of which they are rows are read from the same field (`_token_modules`)."""
    lists = [ids for ids in (value.values() if isinstance(value, Mapping) else [value]) if ids]
    if not all(isinstance(ids, list | tuple) for ids in lists):
        return Refused("token ids are given as a list, or as lists by the table's name")
    if not set(_token_modules(value)) <= set(ROWS):
        return Refused(f"rows of {' and '.join(ROWS)} are trained alone; other modules are not")
    if any(list(ids) != list(lists[0]) for ids in lists):
        return Refused("the same rows of both tables are trained here: give both the same list")
    return list(lists[0]) if lists else None


def _token_modules(value: Any) -> list[str]:
    """Names of the tables that trainable_token_indices means, a bare list those of the embedding."""
    named = value if isinstance(value, Mapping) else {"embed_tokens": value}
    return sorted({str(name).rpartition(".")[2] for name, ids in named.items() if ids})


# Fields of which rules are made are marked by the setting "lora.rules".
PEFT: dict[str, Field] = {
    "r": Field("lora.rules", "rank of each rule"),
    "lora_alpha": Field("lora.rules", "alpha of each rule"),
    "target_modules": Field("lora.rules", 'patterns, first match wins; names and "all-linear", not an expression'),
    "exclude_modules": Field("lora.rules", "left out of the patterns"),
    "layers_to_transform": Field("lora.rules", "layer numbers in the patterns"),
    "layers_pattern": Field("", "layers are found by number", _only(because="layers are found by their number alone")),
    "rank_pattern": Field("lora.rules", "rules of their own, in front"),
    "alpha_pattern": Field("lora.rules", "rules of their own, in front"),
    "lora_dropout": Field("lora.dropout"),
    "use_rslora": Field("lora.rslora"),
    "use_dora": Field("lora.dora"),
    "init_lora_weights": Field("lora.init", "True and PiSSA (an exact decomposition instead of its iterations)", _init),
    "base_model_name_or_path": Field("model"),
    "bias": Field("", "biases stay as they are", _only("none", because="biases stay as they are here")),
    "task_type": Field(
        "",
        "language models",
        _only("CAUSAL_LM", because="language models are trained here (images: --vision.task)"),
    ),
    "peft_type": Field("", "LORA, ADALORA", _only("LORA", because=_OTHER_METHOD)),
    "modules_to_save": Field(
        "lora.modules_to_save", f"{' and '.join(TABLES)}; new tokens of the tokenizer: `data.add_tokens`", _saved
    ),
    "trainable_token_indices": Field(
        "lora.trainable_token_indices",
        "a dict names the tables in `lora.trainable_token_modules`, with equal lists; new tokens of the tokenizer: "
        "`data.add_tokens`",
        _indices,
    ),
    "target_parameters": Field(
        "", "experts are projections here", _only(because="name experts by patterns such as ffn/gate_proj instead")
    ),
    "layer_replication": Field("", "", _only(because="layers are not repeated here")),
    "lora_bias": Field("", "", _only(False, because="adapters have no bias here")),
    "alora_invocation_tokens": Field("", "", _only(because=_OTHER_METHOD)),
    "use_qalora": Field("", "", _only(False, because=_OTHER_METHOD)),
    "use_bdlora": Field("", "", _only(because=_OTHER_METHOD)),
    "velora_config": Field("", "", _only(because=_OTHER_METHOD)),
    "monteclora_config": Field("", "", _only(because=_OTHER_METHOD)),
    "arrow_config": Field("", "", _only(because=_OTHER_METHOD)),
    "kasa_config": Field("", "", _only(because=_OTHER_METHOD)),
    "megatron_config": Field("", "", _only(because="there is no Megatron here; see --mesh")),
    "eva_config": Field("", "settings of an initialisation", ignored=True),
    "corda_config": Field("", "settings of an initialisation", ignored=True),
    "loftq_config": Field("", "settings of an initialisation", ignored=True),
    "lora_ga_config": Field("", "settings of an initialisation", ignored=True),
    "qalora_group_size": Field("", "a setting of use_qalora", ignored=True),
    "fan_in_fan_out": Field("", "without influence on Linear layers", ignored=True),
    "inference_mode": Field("", "said by the verb", ignored=True),
    "auto_mapping": Field("", "of PEFT's own loading", ignored=True),
    "peft_version": Field("", "of the file", ignored=True),
    "revision": Field("", "name a snapshot's folder as --model instead", ignored=True),
    "megatron_core": Field("", "a name of a module", ignored=True),
    "runtime_config": Field("", "of PEFT's own memory", ignored=True),
    "ensure_weight_tying": Field("", "", _only(False, because="a trained embedding and its head are apart here")),
}

_SCHEDULES = {name: name for name in ("cosine", "linear", "constant")} | {"constant_with_warmup": "constant"}
_OPTIMIZERS = dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"), "adamw")
_OPTIMIZERS |= {"adafactor": "adafactor", "sgd": "sgd", "lion_32bit": "lion"}
_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def _reported(value: Any) -> Any:
    names = [value] if isinstance(value, str) else list(value or [])
    return [_TRACKERS[name] for name in names if name in _TRACKERS]


def _dataset(value: Any) -> Any:
    """A path as it is, an id of the hub with its scheme."""
    text = str(value)
    return text if re.search(r"\.\w+$|^[./~]", text) else f"hf:{text}"


def _steps(value: Any) -> Any:
    return max(1, round(value)) if isinstance(value, int | float) and value >= 1 else Refused("give a number of steps")


TRL: dict[str, Field] = {
    "model_name_or_path": Field("model"),
    "dataset_name": Field("data.dataset", "a path, or hf:<org>/<name>", _dataset),
    "dataset_config": Field("data.dataset", "hf:<org>/<name>:<config>", lambda value: None),
    "dataset_train_split": Field("data.train_split"),
    "dataset_test_split": Field("data.eval_split"),
    "output_dir": Field("output"),
    "max_steps": Field("steps", "where it is above 0", lambda value: value if value and value > 0 else None),
    "num_train_epochs": Field("epochs"),
    "per_device_train_batch_size": Field(
        "train.batch_size", "times gradient_accumulation_steps: ours is a step's, over all devices"
    ),
    "gradient_accumulation_steps": Field("train.accumulate"),
    "learning_rate": Field("optimizer.learning_rate"),
    "lr_scheduler_type": Field(
        "optimizer.schedule", "cosine, linear, constant", _choice(_SCHEDULES, "there are cosine, linear and constant")
    ),
    "warmup_ratio": Field("optimizer.warmup_share", "of earlier versions"),
    "warmup_steps": Field("optimizer.warmup_share", "below 1 a share, as in transformers 5; else divided by max_steps"),
    "weight_decay": Field("optimizer.weight_decay"),
    "adam_beta1": Field("optimizer.b1"),
    "adam_beta2": Field("optimizer.b2"),
    "adam_epsilon": Field("optimizer.eps"),
    "max_grad_norm": Field("optimizer.clip_norm"),
    "optim": Field(
        "optimizer.name",
        "AdamW, Adafactor, SGD, Lion",
        _choice(_OPTIMIZERS, "there are adamw, adam, sgd, lion and adafactor, none of them quantized"),
    ),
    "seed": Field("seed"),
    "logging_steps": Field("train.log_every", "", _steps),
    "eval_steps": Field("train.eval_every", "", _steps),
    "save_steps": Field("train.save_every", "", _steps),
    "save_total_limit": Field("train.keep"),
    "eval_strategy": Field(
        "train.eval_every",
        '"no" is 0; "epoch" is left to the library',
        lambda value: {"no": 0, "epoch": -1}.get(str(value)),
    ),
    "report_to": Field("callbacks", "tensorboard, wandb, mlflow", _reported),
    "max_length": Field("data.max_length"),
    "max_seq_length": Field("data.max_length", "of earlier versions"),
    "packing": Field("data.pack", "exact: examples never attend to each other"),
    "assistant_only_loss": Field("data.loss_on", '"assistant"', lambda value: "assistant" if value else None),
    "completion_only_loss": Field(
        "data.loss_on", '"answer"; False is "all"', lambda value: {True: "answer", False: "all"}.get(value)
    ),
    "truncation_mode": Field(
        "data.too_long", '"truncate", from the left of the prompt', lambda value: "truncate" if value else None
    ),
    "dataset_text_field": Field("", "records have a prompt and a completion, or messages", ignored=True),
    "bf16": Field("compute.dtype", "", lambda value: "bfloat16" if value else None),
    "fp16": Field("", "", _only(False, because="half precision is bfloat16 here")),
    "gradient_checkpointing": Field("", "--compute.remat is chosen by what fits", ignored=True),
    "load_in_4bit": Field("compute.quantize", '"nf4"', lambda value: "nf4" if value else None),
    "load_in_8bit": Field("compute.quantize", '"int8"', lambda value: "int8" if value else None),
    "bnb_4bit_quant_type": Field("", "nf4", _only("nf4", because="4 bits are nf4 here")),
    "use_peft": Field("", "always", ignored=True),
    "lora_r": Field("lora.rules", "rank of each rule"),
    "lora_alpha": Field("lora.rules", "alpha of each rule"),
    "lora_target_modules": Field("lora.rules", "as target_modules of PEFT"),
    "lora_dropout": Field("lora.dropout"),
    "use_rslora": Field("lora.rslora"),
    "use_dora": Field("lora.dora"),
    "lora_modules_to_save": PEFT["modules_to_save"],
    "loss_type": Field(
        "", "negative log-likelihood", _only("nll", "chunked_nll", because="the loss is the negative log-likelihood")
    ),
    "neftune_noise_alpha": Field("", "", _only(0, because="embeddings get no noise here")),
    "label_smoothing_factor": Field("", "", _only(0, 0.0, because="labels are not smoothed here")),
    "chat_template_path": Field("", "", _only(because="put chat_template.jinja into the model's folder")),
    "model_init_kwargs": Field("", "", _only(because="say what is meant by --compute.dtype and --compute.quantize")),
    "router_aux_loss_coef": Field("", "", _only(0, 0.0, 0.001, because="routers stay as they are here")),
    "trust_remote_code": Field(
        "", "nothing is executed", _only(False, because="code of models and data is never executed")
    ),
    "eos_token": Field("", "", _only(because="it is the tokenizer's own")),
    "pad_token": Field("", "rows are packed", ignored=True),
    "pad_to_multiple_of": Field("", "rows have one length", ignored=True),
    "padding_free": Field("", "rows are packed", ignored=True),
    "packing_strategy": Field("", "packing is exact", ignored=True),
    "eval_packing": Field("", "evaluation is by item", ignored=True),
    "shuffle_dataset": Field("", "always, by seed", ignored=True),
    "dataset_num_proc": Field("", "all cores", ignored=True),
    "dataset_kwargs": Field("", "of datasets' own loading", ignored=True),
    "dtype": Field(
        "compute.dtype",
        "bfloat16 or float32",
        lambda value: {"bfloat16": "bfloat16", "float32": "float32", "auto": None, None: None}.get(
            value, Refused("there are bfloat16 and float32")
        ),
    ),
    "lora_target_parameters": PEFT["target_parameters"],
    "lora_task_type": PEFT["task_type"],
    "model_revision": Field("", "name a snapshot's folder as --model instead", ignored=True),
    "dataset_streaming": Field("", "data are read by index", ignored=True),
    "attn_implementation": Field("", "attention is chosen by the platform", ignored=True),
    "use_bnb_nested_quant": Field("", "see docs/quantized.md", ignored=True),
    "bnb_4bit_quant_storage": Field("", "see docs/quantized.md", ignored=True),
    "ignore_bias_buffers": Field("", "of PyTorch's data parallelism", ignored=True),
    "activation_offloading": Field("", "see --compute.remat", ignored=True),
}


def from_peft(values: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """A run's settings from those of an ``adapter_config.json`` or a `LoraConfig` as a dict, and what there is to say.

    Raises:
      NaloraError: one that names every field that is refused, with the reason.
    """
    values, allocation = training_settings(values)
    settings, notes = _converted(values, PEFT, "LoraConfig")
    settings |= allocation
    indices = values.get("trainable_token_indices")
    if isinstance(indices, Mapping) and "trainable_token_indices" in settings.get("lora", {}):
        _put(settings, "lora.trainable_token_modules", _token_modules(indices))
    _put(settings, "lora.rules", rules_of(
        rank=values.get("r", 8),
        alpha=values.get("lora_alpha", 8),
        targets=values.get("target_modules"),
        excluded=values.get("exclude_modules"),
        layers=values.get("layers_to_transform"),
        ranks=values.get("rank_pattern"),
        alphas=values.get("alpha_pattern"),
    ))  # fmt: skip
    return settings, notes


def from_trl(values: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """A run's settings from the flat YAML that TRL's scripts take: `SFTConfig`, `ModelConfig` and `ScriptArguments`.

    Raises:
      NaloraError: one that names every field that is refused, with the reason.
    """
    settings, notes = _converted(values, TRL, "SFTConfig")
    accumulate = values.get("gradient_accumulation_steps") or 1
    if "per_device_train_batch_size" in values:
        _put(settings, "train.batch_size", values["per_device_train_batch_size"] * accumulate)
        notes.append(
            "train.batch_size is a step's over all devices: multiply it by the devices that TRL would have used"
        )
    if values.get("dataset_name") and values.get("dataset_config"):
        _put(settings, "data.dataset", f"{settings['data']['dataset']}:{values['dataset_config']}")
    warmup = values.get("warmup_steps")
    if warmup is not None and warmup >= 1:
        steps = values.get("max_steps") or 0
        if steps <= 0:
            raise NaloraError("warmup_steps", expected="max_steps beside it, or warmup_ratio", found=warmup)
        _put(settings, "optimizer.warmup_share", min(warmup / steps, 1.0))
    if settings.get("steps"):
        settings.pop("epochs", None)
    if values.get("lora_target_modules") is not None:
        targets = values["lora_target_modules"]
        everything = targets == ["all-linear"]
        _put(
            settings,
            "lora.rules",
            rules_of(
                rank=values.get("lora_r", 16),
                alpha=values.get("lora_alpha", 32),
                targets="all-linear" if everything else targets,
            ),
        )
    return settings, notes


def _converted(values: Mapping[str, Any], table: Mapping[str, Field], kind: str) -> tuple[Settings, list[str]]:
    """What single fields become; rules are made of several."""
    settings: Settings = {}
    notes, refused = [], []
    for name, value in values.items():
        field = table.get(name)
        if field is None:
            notes.append(f"{name} is not known here: left out")
            continue
        if field.ignored or field.ours == "lora.rules":
            if field.ignored and value not in (None, False, {}, []):
                notes.append(f"{name} is left out: {field.note}")
            continue
        found = field.value(value)
        if isinstance(found, Refused):
            refused.append(f"{name} = {value!r} ({found.reason})")
        elif found is not None and field.ours:
            _put(settings, field.ours, found)
    if refused:
        raise NaloraError(
            kind,
            expected="settings that mean something here",
            found="; ".join(refused),
            remedy="remove them, or change them",
        )
    lora = settings.get("lora", {})
    if "embed_tokens" in lora.get("modules_to_save", ()) or "trainable_token_indices" in lora:
        notes.append(_RESIZED)
    return settings, notes


def _put(settings: Settings, name: str, value: Any) -> None:
    *groups, last = name.split(".")
    for group in groups:
        settings = settings.setdefault(group, {})
    settings[last] = value


def table_of(fields: Mapping[str, Field]) -> Iterator[str]:
    """Rows of the table in Markdown: their field, ours, and what to know."""
    yield "| field | here | |"
    yield "|---|---|---|"
    for name, field in fields.items():
        if field.ours:
            here = f"`{field.ours}`"
        elif field.ignored:
            here = "left out"
        else:
            probe = field.value(object())  # which is nothing that happens here anyway
            here = f"refused: {probe.reason}" if isinstance(probe, Refused) else "the same"
        yield f"| `{name}` | {here} | {field.note} |"
