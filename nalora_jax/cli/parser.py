"""Flags of the command line: one frozen dataclass per subcommand, and files with a run's settings.

tyro creates the flags from these classes and from `nalora_jax.config`, including comments. Heavy
modules are not imported here, so that ``nalora --help`` responds at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from etils import epy
from tyro.conf import Positional, arg
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
)

from nalora_jax.cli.config_files import load_config
from nalora_jax.config import LoRARule, MeshConfig, RunConfig, config_from_dict
from nalora_jax.config.checks import check_path
from nalora_jax.config.settings import GenerationConfig
from nalora_jax.config.structured import COUNT, MAX_RANK, SEED, TOKEN_COUNT, has_type
from nalora_jax.study.sweeps.grid import recorded_sweep

with epy.lazy_imports():  # on first use: help needs no NumPy
    from nalora_jax.evaluate import run_log

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class TrainArgs:
    """Fine-tune a model: adapters, checkpoints, metrics and a report go to --output."""

    # YAML or JSON file of settings that are the base for all other flags; or a Python file whose
    # config() returns them, which is executed: use only files that you trust.
    config: Path | None = None
    # Print the run's plan (the settings as YAML, parameters, rows, steps, an estimate of memory)
    # and stop; no weights are loaded and only the data's cache is written.
    dry_run: bool = False
    # With --dry-run: also print settings that have their default values.
    all: bool = False
    # Train one run for each of these values, in as few programs as possible:
    # SETTING=VALUE,VALUE,...; the option may be repeated, for all combinations. Each run gets a
    # folder below --output.
    sweep: tuple[str, ...] = ()
    run: Annotated[RunConfig, arg(name="")] = field(default_factory=RunConfig)


@dataclass(frozen=True)
class ModelArgs:
    """Flags of the subcommands that run a model, or a model and an adapter."""

    # Alias, hub id, folder or .gguf file; or the folder of a run: its base model with its adapter.
    model: Positional[str]
    # Adapter folder in PEFT's format, or the folder of a run.
    adapter: Path | None = None
    # Dtype of the base weights. By default the run's, else bfloat16.
    dtype: Dtype | None = None
    # Devices along each axis of the mesh; -1 or 0 takes whatever is left.
    mesh: MeshConfig = field(
        default_factory=lambda: MeshConfig(data=1, fsdp=1, tensor=1)
    )


@dataclass(frozen=True)
class GenerateArgs(ModelArgs):
    """Respond to a prompt or a conversation with a model, or with a model and an adapter."""

    # The text to continue; "-" reads it from standard input.
    prompt: str | None = None
    # JSON file of chat messages to respond to instead: a list of {"role": ..., "content": ...}.
    messages: Path | None = None
    sampling: Annotated[GenerationConfig, arg(name="")] = field(
        default_factory=GenerationConfig
    )
    # Seed of the sampling.
    seed: Annotated[int, SEED] = 0
    # Wrap the prompt in the model's chat template. By default as in the run, else not; with images,
    # always.
    chat: bool | None = None
    # Image files for the prompt, for a model with image input (LLaVA, Gemma 3).
    image: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ExportArgs:
    """Write a run's adapter for another tool, and verify it by reloading."""

    # Folder of the run, or an adapter folder.
    run: Positional[Path]
    # New folder to write; for llama.cpp a new .gguf file.
    output: Path
    # The tool that will load it; "gguf" is llama.cpp's --lora, on a base of any quantization.
    target: Annotated[Literal["peft", "vllm", "gguf"], arg(name="for")] = "peft"
    # Base model. By default the base that the adapter names.
    model: str | None = None
    # vLLM's setting of that name, an upper limit of the rank.
    max_lora_rank: Annotated[int, MAX_RANK] = 16


@dataclass(frozen=True)
class MergeArgs:
    """Merge an adapter into its base model and write a Hugging Face folder."""

    # Folder of a run; or a base model, with --adapter.
    model: Positional[str]
    # New folder to write.
    output: Path
    # Adapter folder in PEFT's format, or the folder of a run.
    adapter: Path | None = None
    # Dtype of the written weights; "stored": the base's own fp8 or int8 format, rounded once.
    dtype: Literal["bfloat16", "float16", "float32", "stored"] = "bfloat16"
    # Maximum size of a weight file, such as 5GB or 500MB; larger models are written as several
    # files with an index.
    shard_size: str = "5GB"


@dataclass(frozen=True)
class FromPeftArgs:
    """Write the settings of PEFT (adapter_config.json) as a config of nalora train."""

    # adapter_config.json, or an adapter's folder, or a LoraConfig as YAML or JSON.
    file: Positional[Path]
    # New YAML file to write; by default it is printed.
    output: Path | None = None


@dataclass(frozen=True)
class InspectArgs:
    """Show gate statistics of a model on texts, layer by layer: useful before any training."""

    # Alias, hub id, folder or .gguf file; or the folder of a run: its base model with its adapter.
    model: Positional[str]
    # Adapter folder in PEFT's format, or the folder of a run.
    adapter: Path | None = None
    # Texts to run through the model; by default a few texts of this library.
    texts: tuple[str, ...] = ()
    # Read the texts from this data set instead: as for --data.dataset of nalora train.
    dataset: str | None = None
    # Split of that data set.
    split: str = "validation"
    # Maximum number of examples of that data set.
    limit: Annotated[int, COUNT] = 32
    # Maximum tokens per text.
    max_length: Annotated[int, TOKEN_COUNT] = 256
    # Compare the gates with those of another run of the same base, for example a run with --tune
    # full on the same data: how far both moved the gates from the base, and in which direction.
    against: Path | None = None
    # Write that comparison to this file as JSON.
    json: Path | None = None
    # Also draw a plot into this file (.png, .svg or .pdf).
    picture: Path | None = None
    # Seed of the small random adapter from which the linear limit is computed if no adapter changes
    # the gate.
    seed: Annotated[int, SEED] = 0
    # Dtype of the base weights.
    dtype: Dtype = "float32"


@dataclass(frozen=True)
class ReportArgs:
    """Write report.html of a run again, from its metrics.jsonl; of several runs, a comparison."""

    # Folders of runs. Runs that differ only in their seed are shown as one, with a band.
    run: Positional[tuple[Path, ...]]
    # Several runs: the page to write. By default comparison.html in the current folder.
    output: Path = Path("comparison.html")


@dataclass(frozen=True)
class StudyArgs:
    """Compare training methods over paired seeds: execute runs, show progress, write tables."""

    # "run" (in any number of processes), "status", "report", or "verify" (check the records, repeat
    # runs, compare).
    action: Positional[Literal["run", "status", "report", "verify"]]
    # The study: a folder with protocol.toml, or that file.
    study: Positional[Path]
    # run, verify: maximum number of runs that this process executes (0: all; verify: three).
    limit: Annotated[int, COUNT] = 0
    # run: largest number of runs of a method that train in one program; 0: one on a CPU, as many as
    # memory allows elsewhere.
    together: Annotated[int, COUNT] = 0
    # run: methods whose runs this process executes (none: all), to get the most urgent results
    # first.
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class DoctorArgs:
    """Show versions, devices, CPU kernels and caches, and known issues."""


def registry() -> ConstructorRegistry:
    """Returns tyro's rules of construction, with adapter rules as ``PATTERN:RANK[:ALPHA]``."""
    rules = ConstructorRegistry()

    @rules.primitive_rule
    def adapter_rules(
        info: PrimitiveTypeInfo,
    ) -> PrimitiveConstructorSpec[tuple[LoRARule, ...]] | None:
        """Returns how rules of adapters are parsed and printed; None for other types."""
        if info.type != tuple[LoRARule, ...]:
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="PATTERN:RANK[:ALPHA] ...",
            instance_from_str=lambda texts: tuple(map(LoRARule.from_text, texts)),
            is_instance=lambda value: has_type(value, info.type),
            str_from_instance=lambda value: [rule.text for rule in value],
        )

    @rules.primitive_rule
    def resume(
        info: PrimitiveTypeInfo,
    ) -> PrimitiveConstructorSpec[bool | Literal["auto"]] | None:
        """Returns how ``--resume`` is parsed and printed; None for other types."""
        if info.type != bool | Literal["auto"]:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="[yes|no|auto]",
            instance_from_str=lambda texts: {"yes": True, "no": False}.get(
                texts[0], "auto"
            ),
            is_instance=lambda value: isinstance(value, bool) or value == "auto",
            str_from_instance=lambda value: [
                {"True": "yes", "False": "no"}.get(str(value), "auto")
            ],
        )

    return rules


def defaults(argv: Sequence[str]) -> TrainArgs:
    """Returns the settings of ``--config``, else of the resumed run, else the defaults.

    Raises:
      NaloraError: the file is missing or is not a config.
    """
    config, _ = take_flag(argv, "--config")
    if not config:
        resume = take_flag(argv, "--resume")[0]
        output = take_flag(argv, "--output")[0]
        if resume in ([], ["no"]):
            return TrainArgs()
        folder = (output or [RunConfig.output])[-1]
        check_path("--output", folder)
        swept = recorded_sweep(folder)
        if swept is not None:
            return TrainArgs(
                sweep=swept[0], run=replace(swept[1], output=folder, imports=())
            )
        run = config_from_dict(run_log.recorded_settings(folder))
        # Epochs have become the recorded number of steps, which --steps may now change. Files are
        # executed only if they are named again: a folder may come from somebody else.
        return TrainArgs(
            run=replace(run, output=folder, resume=False, epochs=0.0, imports=())
        )
    check_path("--config", config[-1])
    return TrainArgs(Path(config[-1]), run=load_config(config[-1]))


def take_flag(
    words: Sequence[str], flag: str, ending: str = ""
) -> tuple[list[str], list[str]]:
    """Returns the values of a flag, which may be repeated, and the other words.

    Values are the words up to the next flag, or up to a word without ``ending``.
    """
    values = []
    others = []
    taking = False
    for word in words:
        name, assigned, value = word.partition("=")
        if name == flag:
            taking = not assigned
            if assigned:
                values.append(value)
        elif taking and not word.startswith("--") and word.endswith(ending):
            values.append(word)
        else:
            taking = False
            others.append(word)
    return values, others
