"""The command line: complete help without JAX, refused flags, config files, and how errors end."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nalora_jax.__main__ import guard, main
from nalora_jax.cli import command, usage
from nalora_jax.cli import parser as cli
from nalora_jax.config import LoRARule, RunConfig
from nalora_jax.config.structured import ranges
from nalora_jax.data import pipeline
from nalora_jax.errors import ListedError, NaloraError
from nalora_jax.kinds.record import check_run_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


KINDS = {name: verb.arguments for name, verb in command.VERBS.items()}


def help_of(capsys, monkeypatch, *argv, flag="--help-all"):
    monkeypatch.setenv("COLUMNS", "120")  # boxes below each other
    with pytest.raises(SystemExit) as exit_:
        main([*argv, flag])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def refused(capsys, *argv):
    """The one line that a command says which is refused."""
    assert main(list(argv)) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error.removeprefix("error: ").rstrip("\n")


def test_help_names_every_verb_and_needs_no_jax():
    code = (
        "import sys\nfrom nalora_jax.__main__ import main\n"
        "for words in ('--help', 'train --help', 'train --help-all', '--version'):\n"
        "    try:\n        main(words.split())\n    except SystemExit as ended:\n        assert not ended.code\n"
        "print(sorted({'jax', 'numpy', 'flax', 'matplotlib', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    assert said.endswith("[]\n")
    assert all(verb in said.partition("--import FILE")[0] for verb in KINDS)


@pytest.mark.parametrize("verb", KINDS)
def test_every_flag_of_a_verb_has_help_and_a_default(capsys, monkeypatch, verb):
    shown = " ".join(re.sub("[│─╭╮╰╯]", " ", help_of(capsys, monkeypatch, verb)).split())
    flags = list(usage.flags(KINDS[verb]))
    assert len(flags) > 60 or verb not in ("train", "plan")
    for flag in flags:
        text = re.escape(" ".join(flag.text.split()))
        assert len(text) > 8, flag.name
        assert re.search(rf"{flag.name}\b[^(]*{text} \((default: |required)", shown), flag.name


def test_short_help_names_every_group_and_every_flag_without_a_group(capsys, monkeypatch):
    shown = " ".join(help_of(capsys, monkeypatch, "train", flag="--help").split())
    for flag in usage.flags(KINDS["train"]):
        assert flag.name.partition(".")[0] in shown, flag.name
    assert "rewards are computed, and it is updated. (" in shown  # no summary is cut


OF_TRAIN = "expected a flag of nalora train, found none of that name"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("train --stepz 3", f"--stepz: {OF_TRAIN}; did you mean --steps?"),
        (
            "train --lora.rank 16",
            f"--lora.rank: {OF_TRAIN}; did you mean --lora.rules PATTERN:RANK[:ALPHA]",
        ),
        ("train --steps many", "--steps: expected INT, found 'many'"),
        ("train --steps", "--steps: expected a value, found none"),
        (
            "train --lora.init pisa",
            "--lora.init: expected one of default, pissa, lora_ga, gradient, zero_a",
        ),
        (
            "train --lora.rules ffn",
            "--lora.rules: expected PATTERN:RANK[:ALPHA], e.g. 'ffn/gate_proj:16'",
        ),
        (
            "train extra",
            "nalora train: expected arguments that fit, found Unrecognized options: extra",
        ),
        (
            "fly",
            f"fly: expected a subcommand: {', '.join(KINDS)}, found none of that name; see nalora --help",
        ),
        ("generate m --prompt \udcff", r"--prompt: expected text in UTF-8, found b'\xff'"),
        (
            f"train --data.dataset {'a' * 300}",
            "--data.dataset: expected a path whose parts have 1 to 255",
        ),
        (f"export m --output {ROOT}", f"--output: expected a new or empty folder, found {ROOT}"),
        (
            "eval m --output /etc/passwd/x",
            "--output: expected a path in a folder, found /etc/passwd/x",
        ),
        ("train --optimizer.eps inf", "--optimizer.eps: expected a "),
    ],
)
def test_what_is_typed_wrongly_is_one_line_with_what_was_meant(capsys, argv, said):
    assert said in refused(capsys, *argv.split(" "))


@pytest.mark.parametrize("verb", KINDS)
def test_every_number_of_a_verb_has_a_range(verb):
    """Of the settings of a run tests/config/test_structured.py asserts the same."""
    numbers = {
        flag.field.name
        for flag in usage.flags(KINDS[verb])
        if flag.type in (int, float) and flag.owner is KINDS[verb]
    }
    assert numbers <= ranges(KINDS[verb]).keys()


def test_adapter_rules_are_typed_as_text():
    rules = {
        "ffn/gate_proj:16": LoRARule("ffn/gate_proj", 16),
        "attn:8:32": LoRARule("attn", 8, 32.0),
        "(?:q|v)_proj:4": LoRARule("(?:q|v)_proj", 4),
        r"layers/\d:0/x:8:1.5": LoRARule(r"layers/\d:0/x", 8, 1.5),
        "a b:0": LoRARule("a b", 0),
    }
    assert [LoRARule.from_text(rule.text) for rule in rules.values()] == [*rules.values()]
    _, args = command.parse(["train", "--lora.rules", *rules, "--steps", "5"])
    assert (args.run.lora.rules, args.run.steps) == (tuple(rules.values()), 5)


def write_config(tmp_path, body):
    path = tmp_path / "settings.py"
    path.write_text(f"from nalora_jax.config import *\n{body}\n")
    return path


def test_a_config_file_gives_the_defaults_of_all_flags(tmp_path, capsys, monkeypatch):
    path = write_config(tmp_path, f"{CONFIG}(steps=7, seed=3, lora=LoRAConfig(dropout=0.1))")
    for given in (["--config", str(path)], [f"--config={path}"]):
        _, args = command.parse(["train", "--seed", "4", *given])
        assert args.run == dataclasses.replace(RunConfig(steps=7, seed=4), lora=args.run.lora)
        assert args.run.lora.dropout == 0.1
    assert re.search(
        r"--steps INT\s[^-]*\(default: 7\)",
        help_of(capsys, monkeypatch, "train", "--config", str(path)),
    )
    assert [found.name for found in tmp_path.iterdir()] == ["settings.py"]  # no bytecode beside it


CONFIG = "def config():\n    return RunConfig"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def config(:", "a Python file that can be executed, found SyntaxError"),
        ("", r"a function config\(\) that returns a RunConfig, found none"),
        (f"{CONFIG}(step=3)", r"config\(\) to return a RunConfig, found TypeErr.*'step'"),
        (f"{CONFIG}(lora=LoRAConfig(dropout='a'))", r"lora\.dropout of type float"),
    ],
)
def test_a_broken_config_file_is_one_error(tmp_path, capsys, body, said):
    path = write_config(tmp_path, body)
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --config {path}: expected ")
    assert re.search(said, error)
    assert error.count("\n") == 1


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_the_configs_of_the_repository_are_valid_and_say_their_command(path):
    check_run_config(cli.load_config(path))
    described = path.read_text().split('"""')[1]
    assert all(said in described for said in (f"--config configs/{path.name}", "Expected", "Cost"))


def test_the_main_job_is_the_defaults():
    config = cli.load_config(ROOT / "configs" / "socialiqa_smollm2.py")
    assert config.data.max_length == pipeline.SHORTEST  # which rows of short questions come to
    assert (
        dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=0))
        == RunConfig()
    )


def raising(error):
    def run(*_):
        raise error

    return run


def test_an_error_of_many_lines_becomes_one(capsys):
    assert guard(raising(NaloraError("a\nfile", expected="b", found="c\n  d"))) == 2
    assert capsys.readouterr().err == "error: a file: expected b, found c d\n"
    assert guard(raising(ListedError("a", expected="b", found="2:\n c   d\n e"))) == 2
    assert capsys.readouterr().err == "error: a: expected b, found 2:\n  c d\n  e\n"


def test_lines_are_json_where_that_is_asked_for(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NALORA_LOG_FORMAT", "text")  # put back after the test
    note = lambda args: logging.getLogger("nalora_jax.some.module").info("a note")  # noqa: E731
    monkeypatch.setitem(command.VERBS, "report", command.Verb(cli.ReportArgs, note))
    assert main(["report", "x", "--log-format", "json"]) == 0
    found = json.loads(capsys.readouterr().err)
    assert (found["level"], found["message"]) == ("INFO", "a note")
    assert found["time"] > 1.7e9
    assert main(["--log-format=json", "fly"]) == 2
    found = json.loads(capsys.readouterr().err)
    assert (found["level"], found["message"][:26]) == ("ERROR", "fly: expected a subcommand")


def test_a_closed_pipe_ends_quietly(tmp_path):
    code = (
        "import sys\nfrom nalora_jax.cli import command, parser\nfrom nalora_jax.__main__ import main\n"
        "say = lambda args: [print('x' * 1000) for _ in range(1000)]\n"
        "command.VERBS['report'] = command.Verb(parser.ReportArgs, say)\n"
        "sys.exit(main(['report', 'x']))"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    writer.stdout.readline()
    writer.stdout.close()
    error = writer.stderr.read()
    writer.stderr.close()
    assert (writer.wait(), error) == (141, b"")
