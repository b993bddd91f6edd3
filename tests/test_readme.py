"""The README's own code and commands."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from nalora_jax.optim.gate_state import own_factors

README = Path(__file__).parent.parent / "README.md"


def _blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_a_users_own_module_trains_with_both_mechanisms() -> None:
    (code,) = (block for block in _blocks("python") if "class MyFFN" in block)
    space: dict = {}
    exec(compile(code, str(README), "exec"), space)
    lora, opt_state, gates = space["lora"], space["opt_state"], space["gates"]
    losses = []
    for _ in range(30):
        lora, opt_state, gates, loss = space["step"](lora, opt_state, gates)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert int(gates.count) == 30
    own = own_factors(gates, space["mechanisms"])
    assert float(jnp.std(own["mask"]["ffn"])) > 0.1
    assert float(jnp.std(own["step_scale"]["ffn"])) > 1e-3
    for place in ("gradient_a", "update_b"):
        factor = space["channel_factors"](gates, space["mechanisms"])[place]["ffn"]
        np.testing.assert_allclose(jnp.mean(factor**2), 1.0, rtol=1e-5)


def test_the_page_on_own_models_trains_one() -> None:
    page = README.parent / "docs" / "own_models.md"
    (code,) = _blocks("python", page)
    space: dict = {}
    exec(compile(code, str(page), "exec"), space)
    lora, opt_state, gates = space["lora"], space["opt_state"], space["gates"]
    losses = []
    for _ in range(30):
        lora, opt_state, gates, loss = space["step"](space["variables"], lora, opt_state, gates)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert float(jnp.std(own_factors(gates, space["mechanisms"])["mask"]["layers/1/ffn"])) > 0.1


def test_the_commands_are_the_files_that_exist() -> None:
    shell = "\n".join(_blocks("sh"))
    assert "python train.py" in shell
    assert "python -m pytest" in shell
    for name in re.findall(r"(?:configs|docs|benchmarks)/[\w./]+\.(?:py|md)", README.read_text(encoding="utf-8")):
        assert (README.parent / name).exists(), name


def test_the_front_door_has_what_the_readme_imports() -> None:
    import nalora_jax

    for block in _blocks("python"):
        for names in re.findall(r"from nalora_jax import ([\w, ]+)", block):
            for name in names.split(", "):
                assert getattr(nalora_jax, name) is not None
    assert set(nalora_jax.__all__) == set(nalora_jax._HOMES)
