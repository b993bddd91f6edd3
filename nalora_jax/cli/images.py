"""The subcommands for images: classification and text-to-image retrieval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from nalora_jax.cli.outputs import shown_output
from nalora_jax.config import config_from_dict
from nalora_jax.config.vision import DUAL
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.cli.evaluate import EvalArgs
    from nalora_jax.cli.parser import ExportArgs, MergeArgs


@dataclass(frozen=True)
class ClassifyArgs:
    """Classify images into given classes with a dual encoder such as CLIP, optionally adapted."""

    # Image files.
    images: Positional[tuple[Path, ...]]
    # Folder or hub id of CLIP, SigLIP or another dual encoder; or a run: its base and adapter.
    model: str
    # Classes to choose from, separated by commas.
    labels: str
    # Adapter folder in PEFT's format, or the folder of a run.
    adapter: Path | None = None
    # Prompts of a class, with {} for its name. By default the run's, else "a photo of a {}.".
    templates: tuple[str, ...] = ()
    # Number of classes shown per image, the likeliest first.
    top: int = 3
    # Dtype of the base weights. By default the run's, else float32.
    dtype: Literal["bfloat16", "float32"] | None = None


@dataclass(frozen=True)
class RetrieveArgs:
    """Find the images of a folder that best match a text."""

    # The text.
    text: Positional[str]
    # Folder of images, including its subfolders.
    images: Path
    # Folder or hub id of CLIP, SigLIP or another dual encoder; or a run: its base and adapter.
    model: str
    # Adapter folder in PEFT's format, or the folder of a run.
    adapter: Path | None = None
    # Number of images shown.
    top: int = 5
    # Dtype of the base weights. By default the run's, else float32.
    dtype: Literal["bfloat16", "float32"] | None = None


def classify(args: ClassifyArgs) -> None:
    """Prints every image's likeliest classes with their probabilities, tab-separated."""
    from scipy.special import softmax

    from nalora_jax.loading.dual import load_adapted_dual

    names = [name.strip() for name in args.labels.split(",") if name.strip()]
    if len(names) < 2:
        raise NaloraError(
            "--labels", expected="at least two classes, separated by commas", found=repr(args.labels)
        )
    if not args.images:
        raise NaloraError("IMAGES", expected="at least one image file", found="none")
    pictures = dict(_opened(args.images, skip=False))
    model = load_adapted_dual(args.model, adapter=args.adapter, dtype=args.dtype)
    templates = args.templates or tuple(model.located.run.get("vision", {}).get("templates", ()))
    classes = model.encoders.classes(model.variables, names, templates or ("a photo of a {}.",))
    features = model.encoders.images(model.variables, list(pictures.values()))
    for path, row in zip(pictures, model.encoders.logits(model.variables, features, classes), strict=True):
        shares = softmax(row)
        best = sorted(range(len(names)), key=lambda i, s=shares: -s[i])[: args.top]  # type: ignore[misc]
        print("\t".join([str(path), *(f"{names[i]} {shares[i]:.3f}" for i in best)]))


def retrieve(args: RetrieveArgs) -> None:
    """Prints the images that match the text best, with cosines, tab-separated.

    Images that cannot be read are named.
    """
    import numpy as np

    from nalora_jax.data.images.files import ENDINGS
    from nalora_jax.loading.dual import load_adapted_dual

    if not args.images.is_dir():
        raise NaloraError("--images", expected="a folder", found=str(args.images))
    files = sorted(
        path for path in args.images.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file()
    )
    pictures = dict(_opened(files, skip=True))
    if not pictures:
        raise NaloraError(str(args.images), expected="at least one readable image", found="none")
    model = load_adapted_dual(args.model, adapter=args.adapter, dtype=args.dtype)
    text = model.encoders.texts(model.variables, [args.text])
    cosines = (model.encoders.images(model.variables, list(pictures.values())) @ text.T)[:, 0]
    paths = list(pictures)
    for i in np.argsort(-cosines, kind="stable")[: args.top]:
        print(f"{paths[i]}\t{cosines[i]:.4f}")


def is_dual(model: str | Path, adapter: str | Path | None = None) -> bool:
    """Returns True if the model or adapter is from a run that trained a dual encoder."""
    from nalora_jax.loading.adapted import locate

    return locate(model, adapter).run.get("vision", {}).get("task", "") in DUAL


def evaluate(args: EvalArgs) -> dict[str, Any]:
    """Returns the held-out metric of a run on images, by default on the run's reported images."""
    from nalora_jax.data.images.opened import open_images
    from nalora_jax.evaluate.heldout import describe
    from nalora_jax.loading.dual import load_adapted_dual
    from nalora_jax.runs.dual_pieces import held_out_images

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
    reported, _ = held_out_images(replace(run, data=data), held, model.encoders, classes)
    values: dict[str, Any] = reported.measure(
        model.base.params, model.lora, samples=args.output is not None
    )
    print(f"{data.dataset}[{data.eval_split}]: {describe(values)}")
    return {"model": model.located.base, "adapter": model.located.adapter, "data": vars(data)} | values


def export(args: ExportArgs, card: Callable[[Any, Literal["adapter", "merged"]], str]) -> None:
    """Writes an adapter of a dual encoder for PEFT, and verifies it by reloading."""
    from nalora_jax.files import write_atomically
    from nalora_jax.loading.dual import load_adapted_dual
    from nalora_jax.runs.dual_pieces import write_dual_adapter
    from nalora_jax.weights.folders import new_folder

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
    from nalora_jax.loading.dual import load_adapted_dual
    from nalora_jax.weights.shards import parse_size
    from nalora_jax.weights.vision.hub import resolve_folder
    from nalora_jax.weights.vision.merge import write_merged_dual

    # Merged in float32 and rounded once.
    model = load_adapted_dual(str(args.model), adapter=args.adapter, dtype="float32")
    assert model.lora is not None
    config, base = model.base.config, model.base
    source = Path()
    if not config.trained:
        source = resolve_folder(model.located.base)[0]
    options: dict[str, Any] = {"dtype": args.dtype, "shard_bytes": parse_size(args.shard_size)}
    options["card"] = card(model, "merged")
    write_merged_dual(args.output, config, base.params, model.lora, model.spec, source=source, **options)
    print(f"{shown_output(args.output)}: merged model in {args.dtype}")


def _opened(paths: Sequence[Path], *, skip: bool) -> Iterator[tuple[Path, Any]]:
    import sys

    from nalora_jax.data.images.files import open_image

    for path in paths:
        try:
            yield path, open_image(path)
        except NaloraError as error:
            if not skip:
                raise
            print(f"left out: {error}", file=sys.stderr)
