"""The command line: complete help without JAX, refused flags, config files, and how errors end."""

from __future__ import annotations

import dataclasses
import errno
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nalora_jax.__main__ import guarded, main
from nalora_jax.cli import parser as cli
from nalora_jax.cli import verbs
from nalora_jax.config import LoRARule, RunConfig, check
from nalora_jax.errors import NaloraError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def flags(kind, prefix=""):
    """Every flag that stands for a field of a nested dataclass."""
    for field in dataclasses.fields(kind):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        inner = "" if field.name == "run" and kind is cli.TrainArgs else f"{field.name}."
        if dataclasses.is_dataclass(default):
            yield from flags(type(default), f"{prefix}{inner}")
        else:
            yield f"--{prefix}{field.name}".replace("_", "-")


def help_of(capsys, monkeypatch, *argv):
    monkeypatch.setenv("COLUMNS", "120")  # boxes below each other
    with pytest.raises(SystemExit) as exit_:
        main([*argv, "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def entries(text):
    """What the help says, by flag or positional: {"--steps": "Optimizer steps. (default: 100)"}."""
    found = {}
    for line in re.findall(r"^(?:│ |  )(.*?) *│?$", text, flags=re.MULTILINE):  # boxes only where the output has them
        if line[:1].strip():
            signature, _, said = line.partition("  ")
            name = re.split(r"[ ,]", signature)[0]
            found[name] = said.strip()
        elif line:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as exit_:
        main(list(argv))
    assert exit_.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


# ---------------------------------------------------------------- help


def test_help_names_every_verb_and_needs_no_jax():
    code = (
        "import sys\nfrom nalora_jax.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    print('LOADED', sorted({'jax', 'numpy', 'flax', 'matplotlib', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    for argv in (["--help"], ["train", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "LOADED []" in done.stdout
    assert set(verbs.VERBS) == set(cli.VERBS)


def test_every_verb_has_a_line_in_the_help(capsys, monkeypatch):
    text = help_of(capsys, monkeypatch)
    for verb, kind in cli.VERBS.items():
        assert re.search(rf"{verb} +{re.escape(kind.__doc__.splitlines()[0][:40])}", text)


HELP = r".*[a-z]{2,}.{6,} \((default: .*|required)\)"


def test_every_setting_of_a_run_has_a_flag_with_help_and_default(capsys, monkeypatch):
    shown = entries(help_of(capsys, monkeypatch, "train"))
    found = list(flags(cli.TrainArgs))
    assert len(found) > 60
    for flag in found:
        assert re.fullmatch(HELP, shown[flag]), flag


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "train"])
def test_every_flag_of_a_verb_has_help(capsys, monkeypatch, verb):
    shown = entries(help_of(capsys, monkeypatch, verb))
    for flag in flags(cli.VERBS[verb]):
        name = {"target": "for"}.get(flag[2:], flag[2:])
        assert re.fullmatch(HELP, shown.get(f"--{name}", shown.get(name.upper(), ""))), name


def test_groups_are_described_by_their_own_docstring(capsys, monkeypatch):
    text = help_of(capsys, monkeypatch, "train")
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(field.default_factory):
            assert field.default_factory.__doc__ in text


# ---------------------------------------------------------------- flags


def test_flags_override_nested_settings():
    verb, args = cli.parse(["train", "--steps", "7", "--mask.kind", "hard", "--data.no-pack", "--optimizer.b1", "0.5"])
    assert verb == "train"
    assert (args.run.steps, args.run.mask.kind, args.run.data.pack, args.run.optimizer.b1) == (7, "hard", False, 0.5)
    assert args.run.lora == RunConfig().lora


def test_positional_and_renamed_arguments():
    verb, args = cli.parse(["export", "runs/a", "--output", "out", "--for", "vllm"])
    assert (verb, args.run, args.target) == ("export", Path("runs/a"), "vllm")
    verb, args = cli.parse(["generate", "a-model", "--prompt", "Hello", "--no-chat"])
    assert (verb, args.model, args.prompt, args.chat) == ("generate", "a-model", "Hello", False)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "--stepz", "3"], "Unrecognized options: --stepz"),
        (["train", "--mask.kept", "1"], "Unrecognized options: --mask.kept"),
        (["train", "--steps", "many"], "Error parsing --steps"),
        (["train", "--optimizer.learning-rate", "fast"], "Error parsing --optimizer.learning-rate"),
        (["train", "--mask.kind", "medium"], "invalid choice 'medium'"),
        (["train", "--step-scale.gains", "1", "2"], "--step-scale.gains"),
        (["train", "--lora.rules", "ffn"], "expected PATTERN:RANK[:ALPHA], e.g. 'ffn/gate_proj:16', found 'ffn'"),
        (["train", "extra"], "Unrecognized options: extra"),
        (["fly"], "Available subcommands: train, eval, generate, export, merge, import, inspect, report"),
        ([], "Expected one of {train,"),
        (["report"], "RUN"),
    ],
)
def test_unknown_and_wrongly_typed_flags_are_refused(capsys, argv, said):
    assert said in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("ffn/gate_proj:16", LoRARule("ffn/gate_proj", 16)),
        ("attn:8:32", LoRARule("attn", 8, 32.0)),
        ("(?:q|v)_proj:4", LoRARule("(?:q|v)_proj", 4)),
        (r"layers/\d:0/x:8:1.5", LoRARule(r"layers/\d:0/x", 8, 1.5)),
        ("a b:0", LoRARule("a b", 0)),
    ],
)
def test_adapter_rules_are_typed_as_text(text, rule):
    assert cli.parse_rule(text) == rule
    assert cli.parse_rule(cli.format_rule(rule)) == rule
    _, args = cli.parse(["train", "--lora.rules", text, "down:1", "--steps", "5"])
    assert args.run.lora.rules == (rule, LoRARule("down", 1))
    assert args.run.steps == 5


@pytest.mark.parametrize("text", ["ffn", "ffn:", ":8", "ffn:x", "ffn:8:", "ffn:8:x", "ffn:-1", "ffn:1.5", ""])
def test_broken_adapter_rules_are_refused(text):
    with pytest.raises(ValueError, match=r"expected PATTERN:RANK\[:ALPHA\]"):
        cli.parse_rule(text)


# ---------------------------------------------------------------- config files


def write_config(tmp_path, body, imports="from nalora_jax.config import *"):
    path = tmp_path / "settings.py"
    path.write_text(f"{imports}\n{body}\n")
    return path


def test_a_config_file_gives_the_defaults_of_all_flags(tmp_path, capsys, monkeypatch):
    path = write_config(tmp_path, "def config():\n    return RunConfig(steps=7, seed=3, lora=LoRAConfig(dropout=0.1))")
    for given in (["--config", str(path)], [f"--config={path}"]):
        _, args = cli.parse(["train", "--seed", "4", *given])
        assert args.run == dataclasses.replace(RunConfig(steps=7, seed=4), lora=args.run.lora)
        assert args.run.lora.dropout == 0.1
    assert re.search(r"--steps INT\s[^-]*\(default: 7\)", help_of(capsys, monkeypatch, "train", "--config", str(path)))
    assert [found.name for found in tmp_path.iterdir()] == ["settings.py"]  # no bytecode beside it


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def config(:", "a Python file that can be run, found SyntaxError"),
        ("1 / 0", "a Python file that can be run, found ZeroDivisionError: division by zero"),
        ("", r"a function config\(\) that returns a RunConfig, found none"),
        ("config = 3", r"a function config\(\)"),
        ("def config():\n    return 3", r"config\(\) to return a RunConfig, found int"),
        ("def config():\n    return RunConfig(step=3)", r"config\(\) to return a RunConfig, found TypeError.*'step'"),
        ("def config():\n    return RunConfig(steps='3')", "steps of type int, found '3'"),
        ("def config():\n    return RunConfig(mask=MaskConfig(kind='Soft'))", r"mask\.kind of type Literal.*'Soft'"),
        ("def config():\n    return RunConfig(mask=None)", r"mask of type MaskConfig, found None"),
        (
            "def config():\n    return RunConfig(lora=LoRAConfig(rules=(LoRARule('a'), LoRARule('b', rank=1.5))))",
            r"lora\.rules\[1\]\.rank of type int, found 1\.5",
        ),
        ("def config():\n    return RunConfig(lora=LoRAConfig(rules=[('a', 8)]))", r"lora\.rules of type tuple"),
        ("def config():\n    return RunConfig(step_scale=StepScaleConfig(gains=(1.0, 1.0)))", r"step_scale\.gains"),
    ],
)
def test_a_broken_config_file_is_one_error(tmp_path, capsys, body, said):
    path = write_config(tmp_path, body)
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --config {path}: expected ")
    assert re.search(said, error)
    assert error.count("\n") == 1


def test_whole_numbers_pass_for_real_ones_and_errors_of_ours_pass_through(tmp_path):
    path = write_config(tmp_path, "def config():\n    return RunConfig(optimizer=OptimizerConfig(clip_norm=1))")
    assert cli.load_config(path).optimizer.clip_norm == 1
    path = write_config(tmp_path, "from nalora_jax.errors import *\nraise NaloraError('x', expected='y', found='z')")
    with pytest.raises(NaloraError, match=r"^x: expected y, found z$"):
        cli.load_config(path)


@pytest.mark.parametrize(("name", "found"), [("none.py", "no such file"), ("", "a folder"), ("a.txt", "a.txt")])
def test_what_is_not_a_python_file_is_refused(tmp_path, name, found):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(NaloraError, match=f"expected a Python file.*found {re.escape(found)}"):
        cli.load_config(tmp_path / name)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_the_configs_of_the_repository_are_valid_and_say_their_command(path):
    check(cli.load_config(path))
    text = path.read_text()
    assert f"--config configs/{path.name}" in text.split('"""')[1]
    assert "Expected" in text.split('"""')[1]
    assert "Cost" in text.split('"""')[1]


def test_there_are_configs():
    assert {"socialiqa_smollm2", "commonsense_smollm2", "lora_baseline", "jsonl_chat"} <= {
        path.stem for path in CONFIGS
    }


def test_the_main_job_is_the_defaults():
    assert cli.load_config(ROOT / "configs" / "socialiqa_smollm2.py") == RunConfig()


# ---------------------------------------------------------------- how a command ends


def raising(error):
    def run(*_):
        raise error

    return run


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"error: {tmp_path / 'metrics.jsonl'}: expected the log of a run, found ")
    assert error.count("\n") == 1


def test_an_error_of_many_lines_becomes_one(capsys):
    assert guarded(raising(NaloraError("a\nfile", expected="b", found="c\n  d"))) == 2
    assert capsys.readouterr().err == "error: a file: expected b, found c d\n"


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    monkeypatch.setitem(verbs.VERBS, "report", raising(KeyboardInterrupt()))
    assert main(["report", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_what_the_machine_refuses_is_one_line(capsys):
    assert guarded(raising(OSError(errno.ENOSPC, "No space left on device", "runs/a"))) == 2
    assert capsys.readouterr().err == "error: runs/a: No space left on device\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EBADF, "a bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        guarded(raising(error))


def test_a_closed_pipe_ends_quietly(tmp_path):
    code = (
        "import sys\nfrom nalora_jax.cli import verbs\nfrom nalora_jax.__main__ import main\n"
        "verbs.VERBS['report'] = lambda args: [print('x' * 1000) for _ in range(1000)]\n"
        "sys.exit(main(['report', 'x']))"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    writer.stdout.readline()
    writer.stdout.close()
    error = writer.stderr.read()
    writer.stderr.close()
    assert (writer.wait(), error) == (141, b"")


def test_the_librarys_notes_reach_standard_error_as_plain_lines(capsys):
    guarded(lambda: logging.getLogger("nalora_jax.some.module").info("a note"))
    assert capsys.readouterr() == ("", "a note\n")


def test_train_py_takes_the_same_flags():
    done = subprocess.run(
        [sys.executable, "train.py", "--mask.keep", "x"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2
    assert "Error parsing --mask.keep" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_out_of_range_end_the_run_before_anything_is_written(tmp_path):
    argv = ["-m", "nalora_jax", "train", "--mask.keep", "0", "--output", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (2, "error: --mask.keep: expected a share in (0, 1], found 0.0\n")
    assert list(tmp_path.iterdir()) == []
