"""Fields of multimodal ``config.json`` files that several families share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nalora_jax.common.fields import Fields

# Fields of a tower that do not change the features of images: names, the numbers of random weights
# and of videos, and fields that transformers writes into every config.
_UNREAD = {
    "model_type",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "architectures",
}
_UNREAD |= {"initializer_range", "tokens_per_second", "in_chans", "spatial_patch_size"}
_UNREAD |= {
    "return_dict",
    "id2label",
    "label2id",
    "tie_word_embeddings",
    "_name_or_path",
}
_UNREAD |= {
    "attn_implementation",
    "_attn_implementation_autoset",
    "max_length",
    "num_beams",
}
_UNREAD |= {"num_beam_groups", "num_return_sequences", "temperature", "top_k", "top_p"}
_UNREAD |= {"typical_p", "length_penalty", "repetition_penalty"}


def tower_fields(
    f: Fields, defaults: Mapping[str, Any], others: Iterable[str] = ()
) -> Fields:
    """Returns the fields of the tower, with transformers' ``defaults``.

    Args:
      f: the file's fields.
      defaults: values of the tower's fields that a file may omit.
      others: further fields that the caller reads or that change no features.

    Raises:
      NaloraError: a field is not known that is neither null, false nor empty.
    """
    v = Fields(f.mapping("vision_config"), defaults, f"{f.where}: vision_config")
    known = {*defaults, *others, *_UNREAD}
    for name, value in v.raw.items():
        if value and name not in known:
            expected = f"no such field: this tower has {', '.join(sorted(defaults))}"
            remedy = "towers with other fields are not supported"
            raise v.error(name, expected, repr(value)[:60], remedy)
    return v


def image_token_of(f: Fields) -> int:
    """Returns the id of the image token; transformers 5 renamed the field."""
    stated = f.raw.get("image_token_id") is not None
    return f.integer("image_token_id" if stated else "image_token_index", low=0)


# ---------------------------------------------------------------- sizes of images in tiles

NEXT_SIZES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_SIZES: list[list[int]] = []
for _tall in range(384, 2305, 384):
    for _wide in range(384, 2305, 384):
        ONEVISION_SIZES.append([_tall, _wide])


def read_sizes(f: Fields, side: int) -> tuple[tuple[int, int], ...]:
    """Returns the heights and widths in ``image_grid_pinpoints``, in pixels.

    Args:
      f: fields of a model's or of an image processor's file.
      side: pixels of a tile's side.

    Raises:
      NaloraError: it is no list of pairs, or one is not a multiple of ``side``.
    """
    name = "image_grid_pinpoints"
    value = f.raw.get(name) or f.defaults[name]
    if not isinstance(value, list):
        raise f.error(name, "a list of heights and widths", repr(value)[:60])
    sizes = []
    for pair in value:
        whole = isinstance(pair, list) and len(pair) == 2
        if not whole or not all(
            type(n) is int and n > 0 and n % side == 0 for n in pair
        ):
            expected = f"pairs of multiples of {side}, the side of a tile"
            raise f.error(name, expected, repr(pair)[:60])
        sizes.append((pair[0], pair[1]))
    return tuple(sizes)
