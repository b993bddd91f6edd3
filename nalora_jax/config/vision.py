"""Settings of runs on images: task, record fields, and the conversion of images to batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nalora_jax.config.documented import documented
from nalora_jax.errors import NaloraError

DUAL = ("classify", "contrast")  # tasks of dual encoders


@documented
@dataclass(frozen=True)
class VisionConfig:
    """Dual encoders (CLIP, ...) and multimodal decoders (LLaVA, ...), on --data.dataset."""

    # "" (a language model), "classify" (images among class prompts), "contrast" (images and their
    # captions) or "chat" (conversations about images, with a multimodal decoder).
    task: Literal["", "classify", "contrast", "chat"] = ""
    # Training images per class, drawn by --seed; 0: all of them.
    shots: int = 16
    # Prompts of a class, {} is replaced by its name; features of several prompts are averaged.
    templates: tuple[str, ...] = ("a photo of a {}.",)
    # Names of the classes in place of the data set's own, in the order of its labels.
    classes: tuple[str, ...] = ()
    # Field of a record that holds the image: its bytes, or a file's path.
    image_field: str = "image"
    # Field that holds the image's class: a number or a name.
    label_field: str = "label"
    # Field that holds the image's caption.
    caption_field: str = "caption"
    # chat: the prompt for captions, in records that have no messages and no prompt.
    prompt: str = "Describe the image."
    # Random changes of training images, by (seed, step): "none", "flip", or "crop" (a part of it,
    # and flips).
    augment: Literal["none", "flip", "crop"] = "crop"
    # Smallest share of an image's area that a crop keeps.
    crop_area: float = 0.5
    # Images that are broken, animated or too large: "skip" (named in the log) or "error".
    broken: Literal["skip", "error"] = "skip"
    # Largest number of pixels of an image; larger images are rejected before they are decoded.
    max_pixels: int = 50_000_000
    # classify, contrast: side in pixels of the squares that images are resized to, a multiple of
    # the patch size; positions are interpolated (smaller is faster); 0: the model's size.
    image_size: int = 0
    # Largest number of tokens of a caption; 0: the text encoder's limit.
    caption_length: int = 0
    # Two separately trained towers "image+text": features of their new projections; 0: the
    # narrower tower's width.
    features: int = 0
    # Two separately trained towers: the training loss.
    loss: Literal["softmax", "sigmoid"] = "softmax"


def check_vision(vision: VisionConfig, *, accumulate: int, quantize: str) -> None:
    """Raises an error for settings that are out of range.

    Raises:
      NaloraError: names the flag, the expected value and the actual one.
    """
    _require("templates", bool(vision.templates), "at least one prompt", "none")
    for template in vision.templates:
        _require(
            "templates",
            template.count("{}") == 1,
            "one {} for the class's name in each prompt",
            repr(template),
        )
    if vision.task == "contrast" and accumulate > 1:
        raise NaloraError(
            "--train.accumulate",
            expected='1 with --vision.task "contrast": pairs are told apart from those of their micro-batch only',
            found=accumulate,
            remedy="use a smaller batch, more devices, or --compute.remat full",
        )
    if vision.image_size and vision.task not in DUAL:
        _require(
            "image-size", False, f"0 with any --vision.task but {' and '.join(DUAL)}", vision.image_size
        )
    if vision.task in DUAL and quantize != "none":
        raise NaloraError("--compute.quantize", expected="none for image and text encoders", found=quantize)


def _require(flag: str, holds: bool, expected: str, value: object) -> None:
    if not holds:
        raise NaloraError(f"--vision.{flag}", expected=expected, found=value)
