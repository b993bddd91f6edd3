"""The table of subcommands, and the parsing of command lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import DisallowNone, PositionalMetavarFromFieldName

from nalora_jax.cli import chat, doctor, evaluate, parser, plan, usage, verbs, verify
from nalora_jax.common import buckets
from nalora_jax.common.devices import AXES
from nalora_jax.common.imports import import_files, installed_version
from nalora_jax.config.checks import check_path
from nalora_jax.config.structured import check_ranges, unknown
from nalora_jax.errors import NaloraError


@dataclass(frozen=True)
class Verb:
    """Subcommand of the command line."""

    arguments: type  # the dataclass that defines its flags
    handler: Callable[[Any], None]
    # Flags of its short help by heading, separated by blanks; without any it has only full help.
    shown: Mapping[str, str] = field(default_factory=dict)


_TRAIN = {
    "Run": "--config --model --adapter --output --resume --steps --epochs --seed --dry-run",
    "Data": "--data.dataset --data.eval-split --data.max-length --data.chat --data.loss-on",
    "Adapters, and the steps of their gates": "--lora.rules --mechanisms",
    "Training and evaluation": (
        "--optimizer.learning-rate --train.batch-size --train.eval-every --compute.quantize"
    ),
    "Several runs at once": "--sweep",
}
_PLAN = {
    "Model and machine": "--model --topology --batch --seq",
    "Run": "--lora.rules --mechanisms --compute.quantize --sweep --steps",
    "Result": "--estimate --price --json",
}
VERBS = {
    "train": Verb(parser.TrainArgs, verbs.train, _TRAIN),
    "eval": Verb(evaluate.EvalArgs, evaluate.evaluate),
    "generate": Verb(parser.GenerateArgs, verbs.generate),
    "chat": Verb(chat.ChatArgs, chat.chat),
    "export": Verb(parser.ExportArgs, verbs.export),
    "merge": Verb(parser.MergeArgs, verbs.merge),
    "from-peft": Verb(parser.FromPeftArgs, verbs.from_peft),
    "inspect": Verb(parser.InspectArgs, verbs.inspect),
    "report": Verb(parser.ReportArgs, verbs.report),
    "study": Verb(parser.StudyArgs, verbs.study),
    "verify": Verb(verify.VerifyArgs, verify.verify),
    "plan": Verb(plan.PlanArgs, plan.plan, _PLAN),
    "doctor": Verb(parser.DoctorArgs, doctor.doctor),
}


# Paths that may be in a bucket, besides those of `--adapter`.
_IN_BUCKETS = {
    "export": ("run", "output"),
    "merge": ("output",),
    "from-peft": ("file",),
}
_RESUME = ("yes", "no", "auto")


def execute(argv: Sequence[str]) -> None:
    """Executes the command line ``argv``.

    Raises:
      NaloraError: an unknown subcommand or flag, a value of the wrong type or out of range, or an
        error of the subcommand.
      SystemExit: help or the version was requested, and printed.
    """
    name, args = parse(argv)
    # A run that starts from an adapter, unless it is resumed with the recorded digest.
    if name == "train" and args.run.adapter and not args.run.adapter_sha256:
        # here, since help needs no JAX
        from nalora_jax.loading.initial_adapter import take_adapter_settings

        # The run takes the adapter's settings, unless the command line names others.
        run = take_adapter_settings(args.run, named=_name_settings(argv))
        args = replace(args, run=run)
    VERBS[name].handler(args)


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """Returns the subcommand and its arguments, with numbers checked; raises as `execute` does."""
    usage.check_text(argv)
    name, *words = argv or [""]
    if name in ("", "-h", "--help", "--help-all"):
        text = usage.overview({name: verb.arguments for name, verb in VERBS.items()})
        if not name:
            print(text, file=sys.stderr)
            raise SystemExit(2)
        print(text)
        raise SystemExit(0)
    if name == "--version":
        print(f"nalora_jax {installed_version('nalora_jax')}")
        raise SystemExit(0)
    if name not in VERBS:
        raise unknown(
            name, name, VERBS, f"a subcommand: {', '.join(VERBS)}", "see nalora --help"
        )
    return name, _arguments(name, VERBS[name], words)


def _arguments(name: str, verb: Verb, words: list[str]) -> Any:
    """Returns the arguments of a subcommand; ``words`` follow its name.

    It executes the files of ``--import`` first, because flags may name what they register.

    Raises:
      NaloraError: an unknown flag, or a value of the wrong type or out of range.
      SystemExit: help was requested, and printed.
    """
    words = _spell_out(words)
    for flag in _REPEATED:
        values, others = parser.take_flag(words, flag)
        if values:  # after one flag, as tyro takes the values of the last one only
            words = [*others, flag, *values]
    has_imports = _IMPORT in words
    files, words = parser.take_flag(words, _IMPORT, ".py")
    if has_imports and not files:
        raise NaloraError(
            _IMPORT, expected="Python files, with names that end in .py", found="none"
        )
    helps = [word for word in words if word in ("-h", "--help", "--help-all")]
    if helps and helps[0] != "--help-all" and verb.shown:
        print(usage.short_help(name, verb.arguments, verb.shown))
        raise SystemExit(0)
    trains = verb.arguments is parser.TrainArgs
    if not helps:
        names = import_files(files)
        if names and trains:
            words = [*words, "--imports", *names]
        usage.check_flags(name, verb.arguments, words)
    options: dict[str, Any] = {}
    if trains:
        options["default"] = parser.defaults(words)
    errors: AbstractContextManager[None] = usage.one_line_errors(name)
    if helps:
        words = ["--help"]
        errors = nullcontext()
    with errors:
        args: Any = tyro.cli(
            verb.arguments,
            prog=f"nalora {name}",
            description=(verb.arguments.__doc__ or "").strip(),
            args=words,
            registry=parser.registry(),
            config=(PositionalMetavarFromFieldName, DisallowNone),
            **options,
        )
    if trains and args.run.epochs and parser.take_flag(words, "--steps")[0]:
        raise NaloraError(
            "--steps",
            expected="steps or epochs",
            found="both",
            remedy="leave one of them out",
        )
    check_ranges(args)
    if name in ("generate", "chat"):
        check_ranges(args.sampling)  # a group without a prefix
    _check_paths(name, args)
    return args


def _check_paths(name: str, args: Any) -> None:
    """Checks the paths among the arguments of the subcommand ``name``.

    Raises:
      NaloraError: a path cannot exist, or is in a bucket and must be on this machine.
    """
    flags = {
        flag.field.name: flag.name
        for flag in usage.flags(type(args))
        if flag.owner is type(args)
    }
    in_buckets = ("adapter", *_IN_BUCKETS.get(name, ()))
    for argument in fields(args):
        values = getattr(args, argument.name)
        if not isinstance(values, tuple):
            values = (values,)
        # Positional arguments have their name in the help.
        flag = flags.get(argument.name, argument.name.upper())
        for path in values:
            if not isinstance(path, Path):
                continue
            check_path(flag, path)
            where = buckets.bucket_url(path)
            if where and argument.name not in in_buckets:
                raise NaloraError(
                    flag,
                    expected="a path on this machine",
                    found=where,
                    remedy="copy it from or to the bucket",
                )


def _name_settings(argv: Sequence[str]) -> set[str]:
    """Returns the settings of a run that a command line names, by dotted name.

    Example:
      >>> sorted(_name_settings(["--lora.no-dora", "--model.rope-scaling=linear:2"]))
      ['lora.dora', 'rope_scaling']
    """
    names = set()
    for word in argv:
        if word.startswith("--"):
            flag = word.partition("=")[0].removeprefix("--")
            name = flag.replace("-", "_").replace(".no_", ".")
            if name == "model.rope_scaling":  # the only flag of another name
                name = "rope_scaling"
            names.add(name)
    return names


# Accepted spellings, and the flags that replace them.
_SHORT = {
    ("--mesh", "auto"): tuple(f"--mesh.{axis}=0" for axis in AXES),
    ("--data.max-length", "auto"): ("--data.max-length=0",),
    ("--optimizer.learning-rate", "auto"): ("--optimizer.learning-rate=0",),
    ("--mechanisms", "none"): ("--mechanisms",),
}
_ASSIGNED = ("--resume=", *(f"{flag}=" for flag, _ in _SHORT))
_IMPORT = "--import"
_REPEATED = ("--sweep", "--image")  # flags that may be given several times


def _spell_out(words: list[str]) -> list[str]:
    """Returns the words with short spellings replaced by flags of the parser.

    These are ``auto``, ``--mechanisms none``, ``--resume`` and ``--resume FOLDER``.
    """
    spelled: list[str] = []
    remaining: list[str] = []  # with the flags of short spellings as --flag value
    for word in words:
        if word.startswith(_ASSIGNED):
            remaining += word.split("=", 1)
        else:
            remaining.append(word)
    whole = {"--resume": ["--resume", "yes"], "--no-resume": ["--resume", "no"]}
    while remaining:
        pair = tuple(remaining[:2])
        if pair in _SHORT:
            spelled += _SHORT[pair]
        elif pair[0] == "--resume" and not pair[-1].startswith("-"):
            if pair[1] in _RESUME:
                spelled += pair
            else:
                spelled += ["--output", pair[1], "--resume", "yes"]
        else:
            pair = pair[:1]
            spelled += whole.get(pair[0], pair)
        remaining = remaining[len(pair) :]
    return spelled
