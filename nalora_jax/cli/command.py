"""The table of subcommands, and the parsing of command lines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import DisallowNone, PositionalMetavarFromFieldName

from nalora_jax.cli import chat, doctor, evaluate, parser, plan, usage, verbs, verify
from nalora_jax.common import buckets
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
    verb, args = parse(argv)
    if verb == "train" and args.run.adapter and not args.run.adapter_sha256:
        from nalora_jax.loading.initial_adapter import with_adapter

        args = replace(args, run=with_adapter(args.run, named=_name_settings(argv)))
    VERBS[verb].handler(args)


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
    words = _spell_out(words)
    swept, others = parser.take_flag(words, "--sweep")
    if swept:  # values of the repeated flag after one
        words = [*others, "--sweep", *swept]
    imports = _IMPORT in words
    files, words = parser.take_flag(words, _IMPORT, ".py")
    if imports and not files:
        raise NaloraError(
            _IMPORT, expected="Python files, with names that end in .py", found="none"
        )
    asked = next(
        (word for word in words if word in ("-h", "--help", "--help-all")), None
    )
    if asked in ("-h", "--help") and verb.shown:
        print(usage.short_help(name, verb.arguments, verb.shown))
        raise SystemExit(0)
    trains = verb.arguments is parser.TrainArgs
    if asked is None:
        names = import_files(files)
        if names and trains:
            words = [*words, "--imports", *names]
        usage.check_flags(name, verb.arguments, words)
    if trains:
        start: dict[str, Any] = {"default": parser.defaults(words)}
    else:
        start = {}
    with contextlib.nullcontext() if asked else usage.one_line_errors(name):
        args: Any = tyro.cli(
            verb.arguments,
            prog=f"nalora {name}",
            description=(verb.arguments.__doc__ or "").strip(),
            args=["--help"] if asked else words,
            registry=parser.registry(),
            config=(PositionalMetavarFromFieldName, DisallowNone),
            **start,
        )
    if trains and args.run.epochs and parser.take_flag(words, "--steps")[0]:
        remedy = "leave one of them out"
        raise NaloraError(
            "--steps", expected="steps or epochs", found="both", remedy=remedy
        )
    check_ranges(args)
    if name in ("generate", "chat"):
        check_ranges(args.sampling)  # a group without a prefix
    _check_paths(name, args)
    return args


def _check_paths(name: str, args: Any) -> None:
    """Raises a NaloraError for a path that cannot exist, or that is in a bucket and must be on this
    machine."""
    flags = {
        flag.field.name: flag.name
        for flag in usage.flags(type(args))
        if flag.owner is type(args)
    }
    for argument in fields(args):
        value = getattr(args, argument.name)
        # Positional arguments have their name in the help.
        flag = flags.get(argument.name, argument.name.upper())
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path):
                check_path(flag, path)
                where = buckets.bucket_url(path)
                if where and argument.name not in (
                    "adapter",
                    *_IN_BUCKETS.get(name, ()),
                ):
                    expected = "a path on this machine"
                    remedy = "copy it from or to the bucket"
                    raise NaloraError(
                        flag, expected=expected, found=where, remedy=remedy
                    )


def _name_settings(argv: Sequence[str]) -> set[str]:
    """Returns the settings of a run that a command line names, by dotted name."""
    flags = {
        word.partition("=")[0].removeprefix("--")
        for word in argv
        if word.startswith("--")
    }
    names = {flag.replace("-", "_").replace(".no_", ".") for flag in flags}
    return {{"model.rope_scaling": "rope_scaling"}.get(name, name) for name in names}


# Accepted spellings, and the flags that replace them.
_SHORT = {
    ("--mesh", "auto"): tuple(
        f"--mesh.{axis}=0" for axis in ("data", "fsdp", "context", "tensor")
    ),
    ("--data.max-length", "auto"): ("--data.max-length=0",),
    ("--optimizer.learning-rate", "auto"): ("--optimizer.learning-rate=0",),
    ("--mechanisms", "none"): ("--mechanisms",),
}
_ASSIGNED = ("--resume=", *(f"{flag}=" for flag, _ in _SHORT))
_IMPORT = "--import"


def _spell_out(words: list[str]) -> list[str]:
    """Replaces ``auto``, ``--mechanisms none``, ``--resume`` and ``--resume FOLDER`` by flags of
    the parser."""
    spelled: list[str] = []
    remaining: list[str] = []
    for word in words:
        if word.startswith(_ASSIGNED):
            remaining += word.split("=", 1)
        else:
            remaining.append(word)
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
            whole = {
                "--resume": ["--resume", "yes"],
                "--no-resume": ["--resume", "no"],
            }
            spelled += whole.get(pair[0], pair)
        remaining = remaining[len(pair) :]
    return spelled
