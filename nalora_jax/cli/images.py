"""`nalora eval`, `export` and `merge` of a dual encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nalora_jax.cli.outputs import shown_output
from nalora_jax.config import config_from_dict
from nalora_jax.config.settings import DUAL
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.cli.evaluate import EvalArgs
    from nalora_jax.cli.parser import ExportArgs, MergeArgs


def is_dual(model: str | Path, adapter: str | Path | None = None) -> bool:
    """Returns True if the model or adapter is from a run that trained a dual encoder."""
    from nalora_jax.train.located import locate

    return locate(model, adapter).run.get("vision", {}).get("task", "") in DUAL


def evaluate(args: EvalArgs) -> dict[str, Any]:
    """Returns the held-out metric of a run on images, by default on the run's reported images."""
    from nalora_jax.data.images.opened import open_images
    from nalora_jax.evaluate.evaluator import describe
    from nalora_jax.evaluate.images import Images
    from nalora_jax.train.adapted_dual import load_adapted_dual
    from nalora_jax.train.kinds.dual import image_evaluator, image_indices

    if args.quantize not in (None, "none"):
        raise NaloraError("--quantize", expected="none for image and text encoders", found=args.quantize)
    model = load_adapted_dual(str(args.model), adapter=args.adapter, dtype=args.dtype)
    run = config_from_dict(model.located.run)
    asked: dict[str, Any] = {"dataset": args.dataset, "eval_split": args.split, "eval_limit": args.limit}
    data = replace(run.data, **{name: value for name, value in asked.items() if value is not None})
    vision = run.vision
    classes: tuple[str, ...] = ()
    if vision.task == "classify":
        classes = open_images(data, vision, data.train_split).classes()
    held = open_images(data, vision, data.eval_split)
    reported, _ = image_indices(replace(run, data=data), held)
    evaluator = image_evaluator(model.encoders, Images(held, reported), classes, vision)
    values: dict[str, Any] = evaluator.measure(
        model.base.params, model.lora, samples=args.output is not None
    )
    print(f"{data.dataset}[{data.eval_split}]: {describe(values)}")
    return {"model": model.located.base, "adapter": model.located.adapter, "data": vars(data)} | values


def export(args: ExportArgs, card: Callable[[Any, Literal["adapter", "merged"]], str]) -> None:
    """Writes an adapter of a dual encoder for PEFT, and verifies it by reloading."""
    from nalora_jax.common.files import write_atomically
    from nalora_jax.common.folders import new_folder
    from nalora_jax.train.adapted_dual import load_adapted_dual
    from nalora_jax.train.kinds.dual import write_dual_adapter

    if args.target != "peft":
        raise NaloraError("--for", expected="peft for image and text encoders", found=args.target)
    name, adapter = args.names
    model = load_adapted_dual(name, adapter=adapter)
    assert model.lora is not None
    with new_folder(args.output) as folder:
        write_dual_adapter(folder, model.base, model.lora, model.spec)
        write_atomically(folder / "README.md", card(model, "adapter"))
    print(f"{shown_output(args.output)}: adapter for peft, read back and compared (every number is equal)")


def merge(args: MergeArgs, card: Callable[[Any, Literal["adapter", "merged"]], str]) -> None:
    """Writes a dual encoder merged with its adapter as one Hugging Face folder."""
    from nalora_jax.data.tokenizer import read_json
    from nalora_jax.train.adapted_dual import load_adapted_dual
    from nalora_jax.weights.hub import resolve_folder
    from nalora_jax.weights.merge import write_merged
    from nalora_jax.weights.shards import parse_size

    # Merged in float32 and rounded once.
    model = load_adapted_dual(str(args.model), adapter=args.adapter, dtype="float32")
    assert model.lora is not None
    config, base = model.base.config, model.base
    options: dict[str, Any] = {"dtype": args.dtype, "shard_bytes": parse_size(args.shard_size)}
    options |= {"card": card(model, "merged"), "hf_config": {}, "tokenizer": Path()}
    if not config.trained:
        source = resolve_folder(model.located.base)[0]
        options |= {"hf_config": read_json(source / "config.json"), "tokenizer": source}
    write_merged(args.output, config, base.params, model.lora, model.spec, **options)
    print(f"{shown_output(args.output)}: merged model in {args.dtype}")
