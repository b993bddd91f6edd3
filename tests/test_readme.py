"""What the README names; its code and commands are executed in test_docs_code.py."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def _blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_commands_are_the_files_that_exist() -> None:
    shell = "\n".join(_blocks("sh"))
    assert "python train.py" in shell
    assert "python -m pytest" in shell
    for name in re.findall(
        r"(?:configs|docs|benchmarks)/[\w./]+\.(?:py|md)", README.read_text(encoding="utf-8")
    ):
        assert (README.parent / name).exists(), name


def test_the_front_door_has_what_the_readme_imports() -> None:
    import nalora_jax

    for block in _blocks("python"):
        for names in re.findall(r"from nalora_jax import ([\w, ]+)", block):
            for name in names.split(", "):
                assert getattr(nalora_jax, name) is not None
