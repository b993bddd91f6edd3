"""Converts TRL's `SFTConfig` and `DPOConfig` to the settings of a run.

`TRL` contains every field that these classes add to `TrainingArguments`, and the latter's common
fields; docs/from_trl.md shows the table. Fields that a file does not set have TRL's defaults;
settings that cannot be converted are returned as notes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from nalora_jax.errors import NaloraError, shown
from nalora_jax.weights.foreign_settings import Field, Refused, Settings, choice, converted, only, put
from nalora_jax.weights.peft_rules import listed, rules_of
from nalora_jax.weights.peft_settings import PEFT

Trainer = Literal["sft", "dpo"]
_NO = ("no", False)  # YAML reads a bare no as False
_SCHEDULES = {name: name for name in ("cosine", "linear", "constant")}
_SCHEDULES |= {"constant_with_warmup": "constant"}
_OPTIMIZERS = dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"), "adamw")
_OPTIMIZERS |= {"adafactor": "adafactor", "sgd": "sgd", "lion_32bit": "lion"}
_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def _reported(value: Any) -> Any:
    return [_TRACKERS[name] for name in listed(value) if name in _TRACKERS]


def _dataset(value: Any) -> Any:
    """Returns a path unchanged, and a hub id with its scheme."""
    text = str(value)
    if re.search(r"\.\w+$|^[./~]", text):
        return text
    return f"hf:{text}"


def _steps(value: Any) -> Any:
    if isinstance(value, int | float) and value >= 1:
        return max(1, round(value))
    return Refused("give a number of steps")


def _warmup(value: Any) -> Any:
    """Returns a number of steps; shares, below 1, are read separately (`_schedule`)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        return Refused("give a number of steps, or a share below 1")
    return int(value) if value >= 1 else None


def _loss_name(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1:
        return value[0]
    return value


def _loss(value: Any) -> Any:
    losses = {"nll": None, "chunked_nll": None, "sigmoid": "dpo", "sigmoid_norm": "dpo", None: None}
    name = _loss_name(value)
    if isinstance(name, str | None) and name in losses:
        return losses[name]
    return Refused("losses are nll, and for pairs sigmoid and sigmoid_norm, one at a time")


_OTHER_TRAINER = "of a trainer that is not implemented here: there are SFT and DPO"
TRL: dict[str, Field] = {
    "model_name_or_path": Field("model"),
    "dataset_name": Field("data.dataset", "a path, or hf:<org>/<name>", _dataset),
    "dataset_config": Field("data.dataset", "hf:<org>/<name>:<config>", lambda value: None),
    "dataset_train_split": Field("data.train_split"),
    "dataset_test_split": Field("data.eval_split", "if `eval_strategy` is not no"),
    "output_dir": Field("output"),
    "max_steps": Field("steps", "if above 0", lambda value: value if value and value > 0 else None),
    "num_train_epochs": Field("epochs", "without `max_steps`; TRL's default is 3"),
    "per_device_train_batch_size": Field(
        "train.batch_size",
        "times gradient_accumulation_steps: ours is of a step, over all devices; default 8",
    ),
    "gradient_accumulation_steps": Field("train.accumulate"),
    "learning_rate": Field("optimizer.learning_rate", "TRL's default is 2e-5, with DPO 1e-6"),
    "lr_scheduler_type": Field(
        "optimizer.schedule",
        "linear (the default), cosine, constant; rates end at 0 and warm up from 0, as in transformers",
        choice(_SCHEDULES, "there are cosine, linear and constant"),
    ),
    "lr_scheduler_kwargs": Field("", "", only(because="schedules have no further settings here")),
    "warmup_ratio": Field("optimizer.warmup_share", "of earlier versions"),
    "warmup_steps": Field(
        "optimizer.warmup_steps", "below 1 `optimizer.warmup_share`, as in transformers 5", _warmup
    ),
    "weight_decay": Field("optimizer.weight_decay"),
    "adam_beta1": Field("optimizer.b1"),
    "adam_beta2": Field("optimizer.b2"),
    "adam_epsilon": Field("optimizer.eps"),
    "max_grad_norm": Field("optimizer.clip_norm"),
    "optim": Field(
        "optimizer.name",
        "AdamW, Adafactor, SGD, Lion",
        choice(_OPTIMIZERS, "there are adamw, adam, sgd, lion and adafactor, none of them quantized"),
    ),
    "seed": Field("seed", "TRL's default is 42"),
    "logging_steps": Field("train.log_every", "", _steps),
    "eval_steps": Field("train.eval_every", "by default `logging_steps`", _steps),
    "save_steps": Field("train.save_every", "", _steps),
    "save_total_limit": Field("train.keep"),
    "eval_strategy": Field(
        "train.eval_every", '"no" (the default) is 0; "epoch" is left to the library', lambda value: None
    ),
    "save_strategy": Field("train.save_every", '"no" is 0', dict.fromkeys(_NO, 0).get),
    "report_to": Field("callbacks", "tensorboard, wandb, mlflow", _reported),
    "max_length": Field(
        "data.max_length",
        "TRL's default is 1024; with DPO twice it: a row holds both answers; null is auto",
        lambda value: value or 0,
    ),
    "max_seq_length": Field("data.max_length", "of earlier versions"),
    "packing": Field("data.pack", "off by default, as in TRL; exact: examples never attend to each other"),
    "assistant_only_loss": Field("data.loss_on", '"assistant"', {True: "assistant"}.get),
    "completion_only_loss": Field(
        "data.loss_on", '"answer"; False is "all"', {True: "answer", False: "all"}.get
    ),
    "truncation_mode": Field(
        "data.too_long", '"truncate", always: the prompt loses its beginning', lambda value: None
    ),
    "dataset_text_field": Field(
        "", "the text of a record without a prompt is its field `text`", ignored=True
    ),
    "bf16": Field("compute.dtype", "the default; false is float32", lambda value: None),
    "fp16": Field("", "", only(False, because="half precision is bfloat16 here")),
    "gradient_checkpointing": Field("", "--compute.remat is chosen by what fits", ignored=True),
    "load_in_4bit": Field("compute.quantize", '"nf4"', {True: "nf4"}.get),
    "load_in_8bit": Field("compute.quantize", '"int8"', {True: "int8"}.get),
    "bnb_4bit_quant_type": Field("", "nf4", only("nf4", because="4 bits are nf4 here")),
    "use_peft": Field("", "adapters are trained in any case", lambda value: None),
    "lora_r": Field("lora.rules", "rank of each rule; TRL's default is 16"),
    "lora_alpha": Field("lora.rules", "alpha of each rule; TRL's default is 32"),
    "lora_target_modules": Field(
        "lora.rules", "as target_modules of PEFT, whose default is q_proj and v_proj"
    ),
    "lora_dropout": Field("lora.dropout", "TRL's default is 0.05, with DPO 0 (`disable_dropout`)"),
    "use_rslora": Field("lora.rslora"),
    "use_dora": Field("lora.dora"),
    "lora_modules_to_save": PEFT["modules_to_save"],
    "loss_type": Field(
        "preference.loss",
        "nll, chunked_nll: off; sigmoid: dpo; sigmoid_norm: dpo with `preference.per_token`",
        _loss,
    ),
    "beta": Field("preference.beta", "of DPO; TRL's default is 0.1"),
    "label_smoothing": Field("", "TRL's sigmoid ignores it: here it would act", ignored=True),
    "disable_dropout": Field("lora.dropout", "0 with DPO, unless false", lambda value: None),
    "precompute_ref_log_probs": Field("", "the reference is the base without the adapter", ignored=True),
    "precompute_ref_batch_size": Field("", "of precompute_ref_log_probs", ignored=True),
    "loss_weights": Field("", "", only(because="there is one preference loss at a time")),
    "ld_alpha": Field("", "", only(because="all tokens of an answer count the same here")),
    "f_divergence_type": Field("", "", only("reverse_kl", because="the divergence is the reverse KL")),
    "f_alpha_divergence_coef": Field("", "of f_divergence_type", ignored=True),
    "use_weighting": Field("", "", only(False, because="pairs are not weighted here")),
    "discopop_tau": Field("", "of another loss", ignored=True),
    "sync_ref_model": Field("", "", only(False, because="the reference is the base without the adapter")),
    "ref_model_mixup_alpha": Field("", "of sync_ref_model", ignored=True),
    "ref_model_sync_steps": Field("", "of sync_ref_model", ignored=True),
    "neftune_noise_alpha": Field("", "", only(0, because="embeddings get no noise here")),
    "label_smoothing_factor": Field("", "", only(0, 0.0, because="labels are not smoothed here")),
    "chat_template_path": Field("", "", only(because="put chat_template.jinja into the model's folder")),
    "model_init_kwargs": Field(
        "", "", only(because="say what is meant by --compute.dtype and --compute.quantize")
    ),
    "router_aux_loss_coef": Field("", "", only(0, 0.0, 0.001, because="routers stay as they are here")),
    "desirable_weight": Field("", "", only(because=_OTHER_TRAINER)),
    "undesirable_weight": Field("", "", only(because=_OTHER_TRAINER)),
    "num_generations": Field("", "", only(because=_OTHER_TRAINER)),
    "reward_model_name_or_path": Field("", "", only(because=_OTHER_TRAINER)),
    "trust_remote_code": Field(
        "", "nothing is executed", only(False, because="code of models and data is never executed")
    ),
    "eos_token": Field("", "", only(because="it is the tokenizer's own")),
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
        "bfloat16 or float32; with bf16 TRL computes in bfloat16 in any case",
        choice(
            {"bfloat16": "bfloat16", "float32": "float32", "auto": None}, "there are bfloat16 and float32"
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
# Fields that only DPOConfig has.
_OF_PAIRS = (
    "beta", "label_smoothing", "disable_dropout", "precompute_ref_log_probs", "precompute_ref_batch_size",
    "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "discopop_tau",
    "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
)  # fmt: skip
# Defaults of TRL's and transformers' classes that change a run and differ from ours.
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "seed": 42,
    "max_length": 1024,
    "packing": False,
    "eval_strategy": "no",
}
RATES: dict[Trainer, float] = {"sft": 2e-5, "dpo": 1e-6}
LORA: dict[str, Any] = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
_PEFTS_TARGETS = ("q_proj", "v_proj")  # for Llama, Mistral, Mixtral, Gemma and Qwen


def trainer_of(values: Mapping[str, Any]) -> Trainer:
    """Returns the trainer that a file's fields belong to; DPO only if a field or the loss is of DPO."""
    loss = str(_loss_name(values.get("loss_type")))
    if loss.startswith("sigmoid") or any(name in values for name in _OF_PAIRS):
        return "dpo"
    return "sft"


def from_trl(values: Mapping[str, Any], trainer: Trainer | None = None) -> tuple[Settings, list[str]]:
    """Returns a run's settings and notes from the flat YAML that TRL's scripts take.

    Args:
      values: fields of `SFTConfig` or `DPOConfig`, `ModelConfig` and `ScriptArguments`.
      trainer: "sft" or "dpo"; by default `trainer_of` the fields.

    Raises:
      NaloraError: names every field that is refused, with the reason.
    """
    trainer = trainer or trainer_of(values)
    defaults = DEFAULTS | {"learning_rate": RATES[trainer]}
    if values.get("max_seq_length") is not None:
        defaults["max_length"] = values["max_seq_length"]
    # null is the default, except for max_length, for which it means no limit
    complete = defaults | {
        n: value for n, value in values.items() if value is not None or n == "max_length"
    }
    kind, last = {"sft": ("SFTConfig", _targets), "dpo": ("DPOConfig", _pairs)}[trainer]
    settings, notes = converted(complete, TRL, kind)
    for convert in (_length, _schedule, _batch, _lora, _evaluation, _precision, _data, last):
        notes += convert(settings, complete)
    return settings, notes


def _number(values: Mapping[str, Any], name: str, default: float) -> Any:
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e38:
        raise NaloraError(name, expected="a number", found=shown(value))
    return value


def _length(settings: Settings, values: Mapping[str, Any]) -> list[str]:
    """Sets the length of a run and of its packed sequences."""
    if settings.get("steps"):
        settings.pop("epochs", None)
    put(settings, "data.too_long", "truncate")
    cut = "its beginning"
    if values.get("truncation_mode", "keep_start") == "keep_start":
        cut = "its end"
    return [f"of an example longer than max_length TRL cuts {cut}; here the prompt loses its beginning"]


def _schedule(settings: Settings, values: Mapping[str, Any]) -> list[str]:
    """Lets the learning rate end at 0 and warm up from 0, as transformers' schedules do."""
    put(settings, "optimizer.final_ratio", 0.0)
    put(settings, "optimizer.warmup_from_zero", True)
    steps = _number(values, "warmup_steps", 0)
    share = _number(values, "warmup_ratio", 0)
    if 0 < steps < 1:
        share = steps
    put(settings, "optimizer.warmup_share", float(share))
    if steps >= 1:
        put(settings, "optimizer.warmup_share", 0.0)
    if values["lr_scheduler_type"] != "constant" or not (steps or share):
        return []
    settings["optimizer"].pop("warmup_steps", None)
    put(settings, "optimizer.warmup_share", 0.0)
    return ["transformers' constant schedule has no warm-up: warmup_steps and warmup_ratio are left out"]


def _batch(settings: Settings, values: Mapping[str, Any]) -> list[str]:
    accumulate = _number(values, "gradient_accumulation_steps", 1)
    put(settings, "train.batch_size", _number(values, "per_device_train_batch_size", 8) * accumulate)
    return [
        "train.batch_size is a step's over all devices: multiply it by the devices that TRL would have used"
    ]


def _lora(settings: Settings, values: Mapping[str, Any]) -> list[str]:
    """Converts the adapters of `ModelConfig`, with the defaults of TRL and PEFT.

    If TRL trains all weights, this library's default rules apply.
    """
    named = [name for name in values if str(name).startswith("lora_") and values[name] is not None]
    notes = []
    if not values.get("use_peft"):
        notes = ["without use_peft TRL trains all weights; here adapters are trained"]
    if not named and not values.get("use_peft"):
        return notes
    lora = LORA | {name: values[name] for name in named}
    targets = lora.get("lora_target_modules")
    if targets is None:
        targets = list(_PEFTS_TARGETS)
        notes.append("lora_target_modules is not set: PEFT's default for most models is q_proj and v_proj")
    if targets == ["all-linear"]:
        targets = "all-linear"
    rank, alpha = (_number(lora, name, LORA[name]) for name in ("lora_r", "lora_alpha"))
    put(settings, "lora.rules", rules_of(rank=rank, alpha=alpha, targets=targets))
    put(settings, "lora.dropout", lora["lora_dropout"])
    return notes


def _evaluation(settings: Settings, values: Mapping[str, Any]) -> list[str]:
    """Sets the evaluation interval: `eval_steps`, else `logging_steps`; none by default."""
    strategy = values["eval_strategy"]
    if strategy in _NO:
        put(settings, "train.eval_every", 0)
        if values.get("dataset_test_split"):
            return []
        return [
            "TRL does not evaluate; here data.eval_split is evaluated before and after training: auto is the split "
            "validation, or 5% of the training records, which are then not trained on"
        ]
    every = settings.get("train", {}).get("eval_every") or settings.get("train", {}).get("log_every", 10)
    put(settings, "train.eval_every", -1 if strategy == "epoch" else every)
    put(settings, "data.eval_split", values.get("dataset_test_split", "test"))
    if values.get("load_best_model_at_end"):
        return []
    return [
        "the adapter of the best evaluation is exported; TRL keeps the last one without load_best_model_at_end"
    ]


def _precision(settings: Settings, values: Mapping[str, Any]) -> list[str]:
    """Selects bfloat16 unless the file turns it off.

    TRL's default stores weights in float32 and computes in bfloat16.
    """
    compute = settings.setdefault("compute", {})
    if values.get("dtype") == "auto":
        compute.setdefault("dtype", "bfloat16")
    dtype = compute.setdefault("dtype", "float32")
    if values.get("bf16") not in (None, True):
        return []
    compute["dtype"] = "bfloat16"
    if dtype == "bfloat16":
        return []
    return ["TRL stores the base in float32 and computes in bfloat16; here it is stored in bfloat16 too"]


def _data(settings: Settings, values: Mapping[str, Any]) -> list[str]:
    if values.get("dataset_name") and values.get("dataset_config"):
        put(settings, "data.dataset", f"{settings['data']['dataset']}:{values['dataset_config']}")
    return []


def _targets(settings: Settings, values: Mapping[str, Any]) -> list[str]:
    """Sets the loss tokens, which TRL chooses by the records unless the file does."""
    if values.get("assistant_only_loss") or values.get("completion_only_loss") is not None:
        return []
    return [
        "TRL computes the loss of prompts with completions on the completion, and that of messages on all tokens; here "
        "data.loss_on is answer: for messages set it to all"
    ]


def _pairs(settings: Settings, values: Mapping[str, Any]) -> list[str]:
    """Sets the preference loss; a packed sequence contains both responses of a pair.

    Dropout is off by default, as in DPOConfig.
    """
    put(settings, "preference.loss", "dpo")
    if _loss_name(values.get("loss_type")) == "sigmoid_norm":
        put(settings, "preference.per_token", True)
    put(settings, "data.max_length", 2 * _number(values, "max_length", 0))
    notes = [
        "data.max_length is twice max_length: a row holds both answers of a pair, each after its prompt"
    ]
    if values.get("disable_dropout", True) and settings.get("lora", {}).pop("dropout", 0):
        notes.append("lora_dropout is left out: disable_dropout, the default of DPOConfig, turns it off")
    if not settings["data"]["max_length"]:
        raise NaloraError("max_length", expected="a number of tokens, for pairs", found=None)
    return notes
