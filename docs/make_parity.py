"""Writes docs/parity.md: every family against transformers, by the measurements of tests/models/test_families.py.

python docs/make_parity.py          # minutes; needs the extra `test`
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Parity with transformers

Made by `python docs/make_parity.py` with jax {jax}, transformers {transformers} and torch {torch} on a CPU in float32.
Random weights at tiny size, written by transformers as safetensors and read through the key map. A figure is the
largest difference of logits over the largest logit; the tests require {tolerance:.0e}. Sequences are longer than the
sliding windows and the original contexts. Padded rows are compared where tokens are real, on the worse side of left
and right; a packed row against separate runs of its sequences in transformers. The last column is greedy decoding with
the key and value cache against `generate`: tokens in agreement, of 64.

| family | switched on | logits | padded | packed | greedy |
|---|---|---|---|---|---|
"""

TAIL = """
## Where the two differ on purpose

**Rows of different lengths in one batch, with dynamic or LongRoPE scaling.** Both stretch the rotary embedding by the
sequence's length. transformers takes the longest row of the batch for all of its rows, so that what a model says about
a short text depends on what it is batched with. Here each row (in packing: each sequence) has its own length, which is
what transformers computes for that row alone; a test holds both. Compare batches of one length, or rows one by one.
"""


def load_tests() -> ModuleType:
    """The test module, imported under the precision that its tests run with."""
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    spec = importlib.util.spec_from_file_location("test_families", ROOT / "tests/models/test_families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def row(tests: ModuleType, case: object) -> str:
    """One line of the table."""
    padded = max(tests.measure_padding(case, side) for side in ("left", "right"))
    figures = (tests.measure_plain(case), padded, tests.measure_packing(case))
    cells = [f"{figure:.1e}" for figure in figures]
    return f"| {case.family} | {case.features} | {' | '.join(cells)} | {tests.measure_greedy(case)} |\n"


def main() -> None:
    """Measures all cases and writes the page."""
    tests = load_tests()
    import jax
    import torch
    import transformers

    versions = {module.__name__: module.__version__ for module in (jax, torch, transformers)}
    page = HEAD.format(tolerance=tests.TOLERANCE, **versions)
    for case in tests.CASES:
        page += row(tests, case)
        print(page.rsplit("\n", 2)[1], flush=True)
    (ROOT / "docs/parity.md").write_text(page + TAIL, encoding="utf-8")


if __name__ == "__main__":
    main()
