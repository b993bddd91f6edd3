"""The verbs on images: which class an image is of, and which images a text describes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from nalora_jax.errors import NaloraError


@dataclass(frozen=True)
class ClassifyArgs:
    """Say which of some classes images show, with a dual encoder such as CLIP and perhaps an adapter."""

    # Image files, as many as there are.
    images: Positional[tuple[Path, ...]]
    # Folder or hub id of CLIP, SigLIP or another dual encoder; or the folder of a run: its base with its adapter.
    model: str
    # Classes to choose from, separated by commas.
    labels: str
    # Adapter folder in PEFT's format, or the folder of a run.
    adapter: Path | None = None
    # Prompts of a class, {} its name. By default the run's, else "a photo of a {}.".
    templates: tuple[str, ...] = ()
    # Classes shown of each image, the likeliest first.
    top: int = 3
    # Dtype of the base weights. By default the run's, else float32.
    dtype: Literal["bfloat16", "float32"] | None = None


@dataclass(frozen=True)
class RetrieveArgs:
    """Find the images of a folder that a text describes best."""

    # The text.
    text: Positional[str]
    # Folder of images; those in its subfolders too.
    images: Path
    # Folder or hub id of CLIP, SigLIP or another dual encoder; or the folder of a run: its base with its adapter.
    model: str
    # Adapter folder in PEFT's format, or the folder of a run.
    adapter: Path | None = None
    # Images shown.
    top: int = 5
    # Dtype of the base weights. By default the run's, else float32.
    dtype: Literal["bfloat16", "float32"] | None = None


def classify(args: ClassifyArgs) -> None:
    """Print every image's likeliest classes with their probabilities, tab-separated."""
    from nalora_jax.load.dual import load_adapted_dual

    names = [name.strip() for name in args.labels.split(",") if name.strip()]
    if len(names) < 2:
        raise NaloraError("--labels", expected="at least two classes, separated by commas", found=repr(args.labels))
    if not args.images:
        raise NaloraError("IMAGES", expected="at least one image file", found="none")
    pictures = dict(_opened(args.images, skip=False))
    model = load_adapted_dual(args.model, adapter=args.adapter, dtype=args.dtype)
    templates = args.templates or tuple(model.located.run.get("vision", {}).get("templates", ()))
    classes = model.encoders.classes(model.variables, names, templates or ("a photo of a {}.",))
    features = model.encoders.images(model.variables, list(pictures.values()))
    for path, row in zip(pictures, model.encoders.logits(model.variables, features, classes), strict=True):
        shares = _softmax(row)
        best = sorted(range(len(names)), key=lambda i, s=shares: -s[i])[: args.top]  # type: ignore[misc]
        print("\t".join([str(path), *(f"{names[i]} {shares[i]:.3f}" for i in best)]))


def retrieve(args: RetrieveArgs) -> None:
    """Print the images that fit the text best with their cosines, tab-separated; unreadable ones are named."""
    import numpy as np

    from nalora_jax.data.images.files import ENDINGS
    from nalora_jax.load.dual import load_adapted_dual

    if not args.images.is_dir():
        raise NaloraError("--images", expected="a folder", found=str(args.images))
    files = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    pictures = dict(_opened(files, skip=True))
    if not pictures:
        raise NaloraError(str(args.images), expected="at least one readable image", found="none")
    model = load_adapted_dual(args.model, adapter=args.adapter, dtype=args.dtype)
    text = model.encoders.texts(model.variables, [args.text])
    cosines = (model.encoders.images(model.variables, list(pictures.values())) @ text.T)[:, 0]
    paths = list(pictures)
    for i in np.argsort(-cosines, kind="stable")[: args.top]:
        print(f"{paths[i]}\t{cosines[i]:.4f}")


def _opened(paths: Sequence[Path], *, skip: bool) -> Iterator[tuple[Path, Any]]:
    import sys

    from nalora_jax.data.images import open_image

    for path in paths:
        try:
            yield path, open_image(path)
        except NaloraError as error:
            if not skip:
                raise
            print(f"left out: {error}", file=sys.stderr)


def _softmax(row: Any) -> Any:
    import numpy as np

    weights = np.exp(row - row.max())
    return weights / weights.sum()
