"""Memory of the loss and its gradient over a large vocabulary, against materialised logits.

    python benchmarks/loss_memory.py
    python benchmarks/loss_memory.py --vocab 131072 --dtype bfloat16

Both programs compute the summed cross-entropy of [batch, seq] tokens and the gradient of the hidden
states over the same frozen head; the figure is the temporary memory of each compiled program.
Neither program is executed, so that the figure depends only on shapes and the compiler.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import save
from tables import Row, at_most, requirements

TITLE = "Loss over a large vocabulary: peak memory"
SHORT = "Loss, full logits"
DTYPES = ("float32", "bfloat16")
VOCABULARIES = (131_072, 262_144)


def temporary_bytes(vocab: int, dtype: str, options: argparse.Namespace) -> dict[str, int]:
    """Returns the temporary memory of the chunked and of the plain program."""
    import jax
    import jax.numpy as jnp

    from nalora_jax.ops.cross_entropy import PLAIN_HEAD, cross_entropy
    from nalora_jax.ops.numerics import numerics_for
    from nalora_jax.ops.storage import prepare

    rows = (options.batch, options.seq)
    hidden = jax.ShapeDtypeStruct((*rows, options.d_model), jnp.float32)
    kernel = jax.ShapeDtypeStruct((options.d_model, vocab), dtype)
    targets = jax.ShapeDtypeStruct(rows, jnp.int32)
    weights = jax.ShapeDtypeStruct(rows, jnp.float32)
    numerics = numerics_for(dtype)

    def chunked(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return cross_entropy(hidden, kernel, targets, weights, PLAIN_HEAD, numerics)

    def materialised(
        hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> jax.Array:
        operands = hidden.astype(dtype), jax.lax.stop_gradient(kernel)
        logits = jnp.matmul(*operands, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked))

    def measure(loss: Any, kernel: Any) -> int:
        program = jax.jit(jax.value_and_grad(loss)).lower(hidden, kernel, targets, weights).compile()
        return int(program.memory_analysis().temp_size_in_bytes)

    # The head in the layout that a step uses.
    held = prepare({"params": {"lm_head": {"kernel": kernel}}}, numerics)["params"]["lm_head"]["kernel"]
    return {"chunked": measure(chunked, held), "materialised": measure(materialised, kernel)}


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns one row per vocabulary and dtype."""
    return [
        Row(
            case,
            _mb(result["bytes"]["chunked"]),
            _mb(result["bytes"]["materialised"]),
            _ratio(result),
            at_most(0.1),
        )
        for case, result in record["cases"].items()
    ]


def _ratio(result: dict[str, Any]) -> float:
    return result["bytes"]["chunked"] / result["bytes"]["materialised"]


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record), other="materialised logits")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vocab", type=int, action="append", help=f"default: {' and '.join(map(str, VOCABULARIES))}"
    )
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--d-model", type=int, default=1024)
    options = parser.parse_args()
    record: dict[str, Any] = {"cases": {}}
    for vocab in options.vocab or VOCABULARIES:
        for dtype in options.dtype or DTYPES:
            case = f"{vocab:,} tokens, {dtype} head, {options.batch}x{options.seq} x {options.d_model}"
            result = {"settings": vars(options), "bytes": temporary_bytes(vocab, dtype, options)}
            record["cases"] |= save("loss_memory", case, result)["cases"]
    print(table(record))


if __name__ == "__main__":
    main()
