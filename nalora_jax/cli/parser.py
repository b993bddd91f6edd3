"""The command line's flags: one frozen dataclass per verb, and the Python files that a run's flags may start from.

tyro makes the flags from these classes and from `nalora_jax.config`, comments included. Nothing heavy is imported here,
so that ``nalora --help`` answers at once.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type
from tyro.conf import Positional, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from nalora_jax.cli.images import ClassifyArgs, RetrieveArgs
from nalora_jax.config import LoRARule, MeshConfig, RunConfig, config_from_dict
from nalora_jax.config.ranges import AXIS, COUNT, SEED, SIZE, TOKENS, Range
from nalora_jax.errors import NaloraError

Dtype = Literal["bfloat16", "float32"]
RULE = re.compile(r"(?P<pattern>.+?):(?P<rank>\d+)(?::(?P<alpha>[^:]+))?")


def one_device() -> MeshConfig:
    """The mesh of a verb that was not asked for another one."""
    return MeshConfig(data=1, fsdp=1, tensor=1)


@dataclass(frozen=True)
class TrainArgs:
    """Fine-tune a model: adapters, checkpoints, metrics and a report go to --output."""

    # Python file whose config() returns the RunConfig that all other flags start from. It is executed: use only files
    # that you trust.
    config: Path | None = None
    run: Annotated[RunConfig, arg(name="")] = field(default_factory=RunConfig)


@dataclass(frozen=True)
class EvalArgs:
    """Measure a model, or a model with an adapter, on held-out data."""

    # Alias, hub id, folder or .gguf file; or the folder of a run: its base model with its adapter.
    model: Positional[str]
    # Adapter folder in PEFT's format, or the folder of a run.
    adapter: Path | None = None
    # Task, "tfds:<name>" or JSONL file. By default what the run was trained on, else socialiqa.
    dataset: str | None = None
    # Split. By default the run's, else "validation".
    split: str | None = None
    # Examples at most (0: all). By default the run's, else 400.
    limit: int | None = None
    # Wrap prompts in the model's chat template. By default as the run did, else not.
    chat: bool | None = None
    # Write the numbers to this new JSON file as well.
    output: Path | None = None
    # Dtype of the base weights. By default the run's, else bfloat16.
    dtype: Dtype | None = None
    # Hold the adapted model's projections quantized. By default as the run did, else not.
    quantize: Literal["none", "int8", "nf4"] | None = None
    # Devices along each axis of the mesh; -1 or 0 takes whatever is left.
    mesh: MeshConfig = field(default_factory=one_device)


@dataclass(frozen=True)
class GenerateArgs:
    """Answer a prompt with a model, or with a model and an adapter."""

    # Alias, hub id, folder or .gguf file; or the folder of a run: its base model with its adapter.
    model: Positional[str]
    # The text to continue; "-" reads it from standard input.
    prompt: str
    # Adapter folder in PEFT's format, or the folder of a run.
    adapter: Path | None = None
    # Tokens to generate at most.
    max_new_tokens: int = 128
    # Sampling temperature; 0 takes the likeliest token each time.
    temperature: float = 0.0
    # Sample from the k likeliest tokens only (0: from all).
    top_k: int = 0
    # Sample from the likeliest tokens that together have this probability.
    top_p: float = 1.0
    # Seed of the sampling.
    seed: int = 0
    # Wrap the prompt in the model's chat template. By default as the run was trained, else not.
    chat: bool | None = None
    # Dtype of the base weights. By default the run's, else bfloat16.
    dtype: Dtype | None = None
    # Devices along each axis of the mesh; -1 or 0 takes whatever is left.
    mesh: MeshConfig = field(default_factory=one_device)


@dataclass(frozen=True)
class ExportArgs:
    """Write a run's adapter for another tool, and check that it reads back the same."""

    # Folder of the run, or an adapter folder.
    run: Positional[Path]
    # New folder to write.
    output: Path
    # The tool that will load it.
    target: Annotated[Literal["peft", "vllm"], arg(name="for")] = "peft"
    # Base model. By default the one that the adapter names.
    model: str | None = None
    # vLLM's setting of that name, which the rank must not pass.
    max_lora_rank: int = 16


@dataclass(frozen=True)
class MergeArgs:
    """Fold an adapter into its base model and write a plain Hugging Face folder."""

    # Folder of a run; or a base model, with --adapter.
    model: Positional[str]
    # New folder to write.
    output: Path
    # Adapter folder in PEFT's format, or the folder of a run.
    adapter: Path | None = None
    # Dtype of the written weights.
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


@dataclass(frozen=True)
class ImportArgs:
    """Read an adapter of the PEFT ecosystem, check it against its base, and write it as this library's own."""

    # Adapter folder in PEFT's format.
    adapter: Positional[Path]
    # New folder to write.
    output: Path
    # Base model. By default the one that the adapter names.
    model: str | None = None


@dataclass(frozen=True)
class InspectArgs:
    """Show what a model's gates do on a few texts, layer by layer: useful before any training."""

    # Alias, hub id, folder or .gguf file; or the folder of a run: its base model with its adapter.
    model: Positional[str]
    # Adapter folder in PEFT's format, or the folder of a run.
    adapter: Path | None = None
    # Texts to run through; by default a few of this library's own.
    texts: tuple[str, ...] = ()
    # Take the texts from this task, "tfds:<name>" or JSONL file instead.
    dataset: str | None = None
    # Split of that data.
    split: str = "validation"
    # Examples of that data at most.
    limit: int = 32
    # Tokens per text at most.
    max_length: int = 256
    # Also draw a picture into this file (.png, .svg or .pdf).
    picture: Path | None = None
    # Seed of the small random residual that the linear limit is measured with where no adapter moves the gate.
    seed: int = 0
    # Dtype of the base weights.
    dtype: Dtype = "float32"


@dataclass(frozen=True)
class ReportArgs:
    """Write report.html of a run again, from its metrics.jsonl."""

    # Folder of the run.
    run: Positional[Path]


@dataclass(frozen=True)
class StudyArgs:
    """Compare training methods over paired seeds: do the runs, show how far they are, or write tables and pictures."""

    # "run" (as many processes as you like may), "status", "report", or "verify" (do finished runs again and compare).
    action: Positional[Literal["run", "status", "report", "verify"]]
    # The study: a folder with protocol.toml, or that file.
    study: Positional[Path]
    # run, verify: runs that this process does at most (0: all; of verify three).
    limit: int = 0


@dataclass(frozen=True)
class DoctorArgs:
    """Show versions, devices, CPU kernels and caches, and what is known to go wrong with them."""


# Numbers of the verbs' own flags; those of a run are in `nalora_jax.config`.
_MESH = {"mesh.data": AXIS, "mesh.fsdp": AXIS, "mesh.tensor": AXIS}
RANGES: dict[type, dict[str, Range]] = {
    EvalArgs: {"limit": COUNT, **_MESH},
    GenerateArgs: {
        "max_new_tokens": TOKENS,
        "temperature": Range("a number", "[0, 1000]"),
        "top_k": COUNT,
        "top_p": Range("a share", "(0, 1]"),
        "seed": SEED,
        **_MESH,
    },
    ExportArgs: {"max_lora_rank": Range("a whole number", "[1, 65536]")},
    InspectArgs: {"limit": COUNT, "max_length": TOKENS, "seed": SEED},
    StudyArgs: {"limit": COUNT},
    ClassifyArgs: {"top": SIZE},
    RetrieveArgs: {"top": SIZE},
}


def load_config(path: str | Path) -> RunConfig:
    """What ``config()`` of the Python file at ``path`` returns.

    Raises:
      NaloraError: the file is missing, is not Python, has no ``config``, fails, or returns something else.
    """
    path = Path(path)
    function = getattr(_load_module(path), "config", None)
    if not callable(function):
        raise _bad_config(path, "a function config() that returns a RunConfig", "none of that name")
    try:
        config = function()
    except NaloraError:
        raise
    except (Exception, SystemExit) as error:
        raise _bad_config(path, "config() to return a RunConfig", f"{type(error).__name__}: {error}") from error
    if not isinstance(config, RunConfig):
        raise _bad_config(path, "config() to return a RunConfig", type(config).__name__)
    _check_types(config, path)
    return config


def registry() -> ConstructorRegistry:
    """tyro's rules of construction, and how adapter rules are typed: ``PATTERN:RANK[:ALPHA]``."""
    rules = ConstructorRegistry()

    @rules.primitive_rule
    def adapter_rules(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[tuple[LoRARule, ...]] | None:
        if info.type != tuple[LoRARule, ...]:
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="PATTERN:RANK[:ALPHA] ...",
            instance_from_str=lambda texts: tuple(map(parse_rule, texts)),
            is_instance=lambda value: isinstance(value, tuple) and all(isinstance(one, LoRARule) for one in value),
            str_from_instance=lambda value: [format_rule(rule) for rule in value],
        )

    @rules.primitive_rule
    def resume(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool | Literal["auto"]] | None:
        if info.type != bool | Literal["auto"]:
            return None
        return PrimitiveConstructorSpec(
            nargs="*",  # `--resume` alone means yes
            metavar="[yes|no|auto]",
            instance_from_str=parse_resume,
            is_instance=lambda value: isinstance(value, bool) or value == "auto",
            str_from_instance=lambda value: ["auto" if value == "auto" else "yes" if value else "no"],
        )

    return rules


def parse_resume(texts: Sequence[str]) -> bool | Literal["auto"]:
    """What stands after ``--resume``: nothing is yes.

    Raises:
      ValueError: it is something else; tyro turns this into its own message.
    """
    found: dict[tuple[str, ...], bool | Literal["auto"]] = {(): True, ("yes",): True, ("no",): False, ("auto",): "auto"}
    if tuple(texts) not in found:
        raise ValueError(f"expected nothing, yes, no or auto, found {' '.join(texts)!r}")
    return found[tuple(texts)]


def parse_rule(text: str) -> LoRARule:
    """An adapter rule as typed on the command line.

    Example:
      >>> parse_rule("ffn/gate_proj:16"), parse_rule("attn:8:32")
      (LoRARule(pattern='ffn/gate_proj', rank=16, alpha=None), LoRARule(pattern='attn', rank=8, alpha=32.0))

    Raises:
      ValueError: it is not of the form PATTERN:RANK[:ALPHA]; tyro turns this into its own message.
    """
    match = RULE.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        alpha = match["alpha"]
        return LoRARule(match["pattern"], int(match["rank"]), None if alpha is None else float(alpha))
    except ValueError:
        raise ValueError(f"expected PATTERN:RANK[:ALPHA], e.g. 'ffn/gate_proj:16', found {text!r}") from None


def format_rule(rule: LoRARule) -> str:
    """The text that `parse_rule` reads as ``rule``."""
    return f"{rule.pattern}:{rule.rank}" + ("" if rule.alpha is None else f":{rule.alpha:g}")


def typed(value: Any) -> str:
    """A default as it would be typed; nothing for None and for what is off."""
    if isinstance(value, tuple):
        return " ".join(format_rule(one) if isinstance(one, LoRARule) else str(one) for one in value)
    return "" if value is None or value is False else str(value)


def defaults(argv: Sequence[str]) -> TrainArgs:
    """What the flags of a run start from: the file given by ``--config``, the run that is resumed, or the defaults.

    Raises:
      NaloraError: no file is given, or it is not a config.
    """
    config = values_of(argv, "--config")
    if config is None:
        resume, output = values_of(argv, "--resume"), values_of(argv, "--output")
        return TrainArgs() if resume in (None, ["no"]) else TrainArgs(run=_recorded((output or [RunConfig.output])[0]))
    if not config:
        raise NaloraError("--config", expected="a Python file", found="nothing")
    return TrainArgs(Path(config[0]), load_config(config[0]))


def _recorded(output: str) -> RunConfig:
    """The settings of the run in ``output``, which it is continued with; the defaults where there is none."""
    from nalora_jax.train.metrics import recorded_settings

    settings = recorded_settings(output)
    return replace(config_from_dict(settings) if settings else RunConfig(), output=output, resume=False)


def values_of(argv: Sequence[str], flag: str) -> list[str] | None:
    """What stands behind a flag, up to the next one; None where it is not given. The last time counts."""
    found = None
    for index, word in enumerate(argv):
        name, assigned, value = word.partition("=")
        if name == flag and assigned:
            found = [value]
        elif word == flag:
            rest = argv[index + 1 :]
            end = next((i for i, one in enumerate(rest) if one.startswith("--")), len(rest))
            found = list(rest[:end])
    return found


def _load_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise _bad_config(path, "a Python file", "a folder" if path.is_dir() else "no such file")
    spec = importlib.util.spec_from_file_location("nalora_config", path)
    if spec is None or spec.loader is None:
        raise _bad_config(path, "a Python file, with a name that ends in .py", path.name)
    module = importlib.util.module_from_spec(spec)
    write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leave no cache beside the user's file
    try:
        spec.loader.exec_module(module)
    except NaloraError:
        raise
    except (Exception, SystemExit) as error:  # a file that ends the program must not look like a finished run
        raise _bad_config(path, "a Python file that can be run", f"{type(error).__name__}: {error}") from error
    finally:
        sys.dont_write_bytecode = write_bytecode
    return module


def _check_types(config: Any, path: Path, prefix: str = "") -> None:
    """Raises unless every field of the nested dataclasses has its declared type: Python itself does not check."""
    hints = get_type_hints(type(config))
    for one in fields(config):
        name, value = f"{prefix}{one.name}", getattr(config, one.name)
        try:
            check_type(value, hints[one.name], collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError as error:
            hint = hints[one.name]
            hint = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise _bad_config(path, f"{name} of type {hint}", repr(value)) from error
        for index, part in enumerate(value if isinstance(value, tuple) else ()):
            if is_dataclass(part):
                _check_types(part, path, f"{name}[{index}].")
        if is_dataclass(value):
            _check_types(value, path, f"{name}.")


def _bad_config(path: Path, expected: str, found: str) -> NaloraError:
    remedy = "see the files in configs/ for examples"
    return NaloraError(f"--config {path}", expected=expected, found=found, remedy=remedy)
