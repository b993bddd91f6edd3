"""Tiny vision models with random weights, as transformers saves them, and conversations about
coloured squares."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from tests import tiny

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
QUESTION = "What colour is this?"
SQUARE = {"height": 16, "width": 16}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[EOS]",
    "[CLS]",
    "a",
    "photo",
    "of",
    "the",
    "red",
    "green",
    "blue",
    "square",
]
WORDS += ["circle", "cross", "dress", "bag", "boot"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<start_of_image>", "<end_of_image>"]
SPECIAL += ["<end_of_turn>", "<start_of_turn>"]
CHAT_WORDS = [
    *SPECIAL,
    " ",
    "\n",
    "\n\n",
    "\n\n\n",
    ":",
    ".",
    "?",
    "USER",
    "ASSISTANT",
    "user",
    "model",
]
CHAT_WORDS += [*WORDS[4:13], "What", "colour", "is", "this", "Describe", "image"]
# The chat templates of llava-hf/llava-1.5-7b-hf and, without its system turn, google/gemma-3-4b-it.
TEMPLATES = Path(__file__).parent / "data" / "images" / "templates"
# Models whose tower reads packed patches: special tokens, sizes of all and settings of each.
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
QWEN_SPECIAL += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_WORDS = [*QWEN_SPECIAL, *CHAT_WORDS[len(SPECIAL) :], "system", "assistant", "You", "are"]
QWEN_WORDS += ["helpful", "large", "small"]
PATCH_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
PATCH_TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 32,
}
PATCH_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl": {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]},
    "qwen3_vl_moe": {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]},
    "qwen3_5": {"num_position_embeddings": 25},
    "qwen3_5_moe": {"num_position_embeddings": 25},
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_HYBRID: dict[str, Any] = {
    "head_dim": 16,
    "rope_parameters": PATCH_TEXT["rope_parameters"] | {"partial_rotary_factor": 0.5},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "attn_output_gate": True,
}
# Settings of the text model by family.
PATCH_TEXTS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": _EXPERTS | {"mlp_only_layers": [1]},
    "qwen3_5": _HYBRID,
    "qwen3_5_moe": _HYBRID | _EXPERTS | {"shared_expert_intermediate_size": 20},
}
PATCH_PIXELS = {"min_pixels": 64, "max_pixels": 1024}  # 1 to 16 tokens
# Models whose images are in tiles: special tokens, and settings of each family.
TILE_SPECIAL = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
for _row in range(1, 5):
    for _column in range(1, 5):
        TILE_SPECIAL.append(f"<row_{_row}_col_{_column}>")
TILE_WORDS = [*CHAT_WORDS, "User", "Assistant", "large", "small", *TILE_SPECIAL]
TILE_WORDS += ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|image_start|>", "<|image_end|>"]
TILE_WORDS.append("<|img_thumbnail|>")
for _row in range(1, 5):
    for _column in range(1, 5):
        TILE_WORDS.append(f"<|img_row_{_row}_col_{_column}|>")
_SPLIT = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
_PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48]]
_NEXT = {"size": {"shortest_edge": 16}, "crop_size": SQUARE, "image_grid_pinpoints": _PINPOINTS}
_ONEVISION = {"size": SQUARE, "image_grid_pinpoints": [[16, 16], *_PINPOINTS, [48, 48]]}
# Image processor, its settings, and those of the model.
TILE_FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "idefics3": ("Idefics3ImageProcessor", _SPLIT, {"scale_factor": 2}),
    "smolvlm": ("SmolVLMImageProcessor", _SPLIT, {"scale_factor": 2}),
    "llava_next": ("LlavaNextImageProcessor", _NEXT, {"image_grid_pinpoints": _PINPOINTS}),
    "llava_onevision": (
        "LlavaOnevisionImageProcessor",
        _ONEVISION,
        {
            "image_grid_pinpoints": _ONEVISION["image_grid_pinpoints"],
            "vision_aspect_ratio": "anyres_max_4",
        },
    ),
}
# Models whose towers read packed patches, with text of their own: image processor, its settings, the
# model's, those of its tower and of its text model.
_PIXTRAL = {"size": {"longest_edge": 40}, "patch_size": {"height": 4, "width": 4}}
PACKED_FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "mistral3": (
        "PixtralImageProcessor",
        _PIXTRAL,
        {"spatial_merge_size": 2},
        {"model_type": "pixtral", "image_size": 40, "hidden_act": "silu", "patch_size": 4},
    ),
    "lfm2_vl": (
        "Lfm2VlImageProcessor",
        {
            "encoder_patch_size": 4,
            "tile_size": 16,
            "max_tiles": 4,
            "min_image_tokens": 2,
            "max_image_tokens": 6,
        },
        {"downsample_factor": 2, "projector_hidden_size": 28},
        {
            "model_type": "siglip2_vision_model",
            "num_patches": 25,
            "patch_size": 4,
            "vision_use_head": False,
        },
    ),
}
PACKED_SPECIAL = [word for word in TILE_WORDS if word.startswith(("[IMG", "<|im"))]
# Families that `make_tile_model` makes.
PLACED_FAMILIES = (*TILE_FAMILIES, *PACKED_FAMILIES)
_HEADLESS = {"model_type": "siglip_vision_model", "vision_use_head": False}
_TILE_TOWERS: dict[str, dict[str, Any]] = {
    "idefics3": {},
    "smolvlm": {},
    "llava_next": {"model_type": "clip_vision_model"},
    "llava_onevision": _HEADLESS,
}
PROCESSORS = {
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 16}, "crop_size": SQUARE}),
    "siglip": ("SiglipImageProcessor", {"size": SQUARE}),
    "siglip2": ("Siglip2ImageProcessor", {"patch_size": 4, "max_num_patches": 16}),
    "vision-text-dual-encoder": ("ViTImageProcessor", {"size": SQUARE}),
}


def _tokenizer(words: list[str], template: str, split: str | None = None, **settings: Any) -> Any:
    import transformers

    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token=settings["unk_token"])
    )
    if split is None:
        backend.normalizer, backend.pre_tokenizer = (
            normalizers.Lowercase(),
            pre_tokenizers.Whitespace(),
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
        backend.decoder = decoders.Fuse()
    ends = [(name, vocabulary[name]) for name in template.split() if name in vocabulary]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def _save(make: Callable[[], Any], folder: Path) -> Path:
    """Saves a model whose weights are neither near zero nor alike."""
    import torch

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = make()
        for name, leaf in model.named_parameters():
            if leaf.ndim and "logit" not in name:
                wide = leaf.shape[-1] ** -0.5 if leaf.ndim > 1 else 0.2
                leaf.copy_(torch.randn(leaf.shape) * wide + (leaf if leaf.ndim == 1 else 0))
    model.save_pretrained(folder)
    return folder


def make_dual(
    folder: Path, family: str, *, vision: dict | None = None, text: dict | None = None, **top: Any
) -> Path:
    """A dual encoder: model, tokenizer, processor. ``make_dual(folder, "clip",
    vision={"hidden_act": "gelu"})``."""
    import transformers

    ids = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 2}
    image = SIZES | {"num_patches" if family == "siglip2" else "image_size": 16, "patch_size": 4}
    image |= vision or {}
    words = SIZES | ids | {"vocab_size": 40, "max_position_embeddings": 12} | (text or {})
    if family == "vision-text-dual-encoder":
        kinds = transformers.models.auto.CONFIG_MAPPING
        tower = kinds[image.pop("model_type", "vit")](**image)
        read = kinds[words.pop("model_type", "bert")](**words)
        join = transformers.VisionTextDualEncoderConfig.from_vision_text_configs
        config = join(tower, read, **{"projection_dim": 24, **top})
    else:
        config = transformers.CONFIG_MAPPING[family](vision_config=image, text_config=words, **top)
    _save(lambda: transformers.AutoModel.from_config(config), folder)
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    template = "$A [EOS]" if family.startswith("siglip") else "[CLS] $A [EOS]"
    length = words["max_position_embeddings"]
    _tokenizer(WORDS, template, model_max_length=length, **names).save_pretrained(folder)
    kind, settings = PROCESSORS[family]
    getattr(transformers, f"{kind}Pil")(**settings).save_pretrained(folder)
    return folder


def make_towers(folder: Path) -> tuple[Path, Path]:
    """A ViT (32 wide, 3 layers) and a BERT (48 wide, 2 layers) that were never trained together."""
    import transformers

    sizes = {"vision": {"num_hidden_layers": 3}, "text": {"hidden_size": 48}}
    donor = make_dual(folder / "donor", "vision-text-dual-encoder", **sizes)
    model = transformers.AutoModel.from_pretrained(donor)
    for name, tower in (("image", model.vision_model), ("text", model.text_model)):
        tower.save_pretrained(folder / name)
        for file in (*donor.glob("*token*"), donor / "preprocessor_config.json"):
            shutil.copy(file, folder / name)
    return folder / "image", folder / "text"


def make_vision_model(
    folder: Path, family: str, *, vision: dict | None = None, text: dict | None = None, **top: Any
) -> Path:
    """A vision-language model: model, tokenizer, chat template, image processor. Tokens are words and
    white space."""
    import transformers

    image = SIZES | {"num_hidden_layers": 3, "image_size": 16, "patch_size": 4, **(vision or {})}
    words = SIZES | {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_key_value_heads": 2,
        "vocab_size": 48,
    }
    words |= {
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    top = {"image_token_index": SPECIAL.index("<image>"), **top}
    names = {
        "image_token": "<image>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens |= {"additional_special_tokens": SPECIAL[4:], "extra_special_tokens": names}
    own = _tokenizer(CHAT_WORDS, "<s> $A", r"\w+|\n+|[^\w\n]", model_max_length=256, **tokens)
    if family == "llava":
        tower = transformers.CLIPVisionConfig(**image)
        read = transformers.LlamaConfig(**words | (text or {}))
        config = transformers.LlavaConfig(vision_config=tower, text_config=read, **top)
        processor = transformers.LlavaProcessor(
            transformers.CLIPImageProcessorPil(**PROCESSORS["clip"][1]),
            own,
            patch_size=4,
            vision_feature_select_strategy=top.get("vision_feature_select_strategy", "default"),
            num_additional_image_tokens=1,
            chat_template=(TEMPLATES / f"{family}.jinja").read_text(),
        )
    else:
        words |= {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 6,
            "head_dim": 8,
        }
        tower = transformers.SiglipVisionConfig(**image, vision_use_head=False)
        read = transformers.Gemma3TextConfig(**words | (text or {}))
        indices = {"boi_token_index": SPECIAL.index("<start_of_image>")}
        indices |= {"eoi_token_index": SPECIAL.index("<end_of_image>"), "mm_tokens_per_image": 4}
        config = transformers.Gemma3Config(vision_config=tower, text_config=read, **indices | top)
        processor = transformers.Gemma3Processor(
            transformers.models.gemma3.image_processing_pil_gemma3.Gemma3ImageProcessorPil(
                size=SQUARE
            ),
            own,
            chat_template=(TEMPLATES / f"{family}.jinja").read_text(),
            image_seq_length=4,
        )
    processor.save_pretrained(folder)
    return _save(lambda: transformers.AutoModelForImageTextToText.from_config(config), folder)


def make_patch_model(folder: Path, family: str, **top: Any) -> Path:
    """A vision-language model whose tower reads packed patches: model, tokenizer, chat template,
    image processor."""
    import transformers

    number = QWEN_SPECIAL.index
    tokens = {
        "image_token_id": number("<|image_pad|>"),
        "video_token_id": number("<|video_pad|>"),
        "vision_start_token_id": number("<|vision_start|>"),
        "vision_end_token_id": number("<|vision_end|>"),
    }
    config = transformers.CONFIG_MAPPING[family](
        text_config=PATCH_TEXT | PATCH_TEXTS.get(family, {}),
        vision_config=PATCH_TOWER | PATCH_FAMILIES[family],
        **tokens | top,
    )
    config._attn_implementation = "eager"
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    tokenizer = _tokenizer(
        QWEN_WORDS,
        "$A",
        r"\w+|\n+|[^\w\n]",
        model_max_length=256,
        additional_special_tokens=[name for name in QWEN_SPECIAL if name != "<unk>"],
        **names,
    )
    tokenizer.chat_template = (TEMPLATES / "qwen_vl.jinja").read_text()
    tokenizer.save_pretrained(folder)
    kind = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil
    kind(patch_size=4, merge_size=2, **PATCH_PIXELS).save_pretrained(folder)
    return _save(lambda: transformers.AutoModelForImageTextToText.from_config(config), folder)


def _of_side(value: Any, side: int) -> Any:
    """Settings of a processor whose multiples of 16 pixels are multiples of ``side``."""
    if isinstance(value, dict):
        return {name: _of_side(each, side) for name, each in value.items()}
    if isinstance(value, list):
        return [_of_side(each, side) for each in value]
    if type(value) is int and value % 16 == 0:
        return value // 16 * side
    return value


def make_tile_model(
    folder: Path, family: str, *, patch_size: int = 4, side: int = 16, **top: Any
) -> Path:
    """A vision-language model whose images are in tiles: model, tokenizer, chat template, image
    processor."""
    import transformers

    tower = SIZES | {"num_hidden_layers": 3, "image_size": side, "patch_size": patch_size}
    if family in PACKED_FAMILIES:
        kind, settings, fields, of_tower = PACKED_FAMILIES[family]
        tower |= of_tower
    else:
        kind, settings, fields = _of_side(list(TILE_FAMILIES[family]), side)
        tower |= _TILE_TOWERS[family]
    text = SIZES | {"hidden_size": 24, "intermediate_size": 40, "num_key_value_heads": 2}
    text |= {"vocab_size": 96, "max_position_embeddings": 512, "bos_token_id": 1}
    text |= {"eos_token_id": 2, "pad_token_id": 0, "model_type": "llama"}
    if family == "llava_onevision":
        text["model_type"] = "qwen2"
    place = "image_token_id"
    if family.startswith("llava") or family == "mistral3":
        place = "image_token_index"
    image = "<image>"
    if family == "mistral3":
        image = "[IMG]"
        text |= {"model_type": "mistral", "sliding_window": None, "head_dim": 6}
        top |= {"tie_word_embeddings": False}
    if family == "lfm2_vl":
        text |= {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}
        text |= {"block_auto_adjust_ff_dim": False}
    top = fields | {place: TILE_WORDS.index(image)} | top
    config = transformers.CONFIG_MAPPING[family](vision_config=tower, text_config=text, **top)
    config._attn_implementation = "eager"
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens |= {"additional_special_tokens": [*SPECIAL[4:], *TILE_SPECIAL, *PACKED_SPECIAL]}
    tokenizer = _tokenizer(TILE_WORDS, "<s> $A", r"\w+|\n+|[^\w\n]", model_max_length=512, **tokens)
    template = "llava" if family.startswith("llava") else "idefics3"
    source = (TEMPLATES / f"{template}.jinja").read_text()
    tokenizer.chat_template = source.replace("<image>", image)
    tokenizer.save_pretrained(folder)
    if family == "lfm2_vl":  # transformers' class needs torchvision
        written = {"image_processor_type": kind} | settings
        (folder / "preprocessor_config.json").write_text(json.dumps(written))
    else:
        getattr(transformers, f"{kind}Pil")(**settings).save_pretrained(folder)
    return _save(lambda: transformers.AutoModelForImageTextToText.from_config(config), folder)


def placeholder_of(folder: Path) -> str:
    """The text that a model's template writes for an image."""
    raw = json.loads((folder / "config.json").read_text())
    return {"mistral3": "[IMG]"}.get(raw["model_type"], "<image>")


def tile_inputs(
    folder: Path, texts: list[str], images: list[list[Any]], special: bool = False
) -> Any:
    """The inputs of transformers' model for texts with placeholders, by its own processor.

    SmolVLM's needs packages for videos; the text that it makes of images is Idefics 3's
    (`tests/data/images/test_texts.py`).
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    if config.model_type == "lfm2_vl":
        return _naflex_inputs(folder, tokenizer, texts, images)
    pixels = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    side = config.vision_config.image_size // config.vision_config.patch_size
    if config.model_type in ("idefics3", "smolvlm"):
        tokens = (side // config.scale_factor) ** 2
        processor = transformers.Idefics3Processor(pixels, tokenizer, image_seq_len=tokens)
    elif config.model_type == "llava_next":
        processor = transformers.LlavaNextProcessor(
            pixels,
            tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,
        )
    elif config.model_type == "mistral3":
        return _pixtral_inputs(config, tokenizer, pixels, texts, images)
    else:
        # Its video processor needs torchvision.
        processor = object.__new__(transformers.LlavaOnevisionProcessor)
        vars(processor).update(image_processor=pixels, tokenizer=tokenizer, chat_template=None)
        vars(processor).update(
            num_image_tokens=side**2,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            vision_aspect_ratio=config.vision_aspect_ratio,
            image_token="<image>",
            image_token_id=config.image_token_id,
            video_token="<video>",
            video_token_id=config.video_token_id,
        )
    if config.model_type == "llava_next":
        images = [image for of_text in images for image in of_text]
    return processor(images=images, text=texts, return_tensors="pt", add_special_tokens=special)


def _naflex_inputs(folder: Path, tokenizer: Any, texts: list[str], images: Any) -> Any:
    """`tile_inputs` of LFM2-VL, whose processors need torchvision, from this library's, which
    `tests/data/images/test_naflex.py` compares with them."""
    import torch

    from nalora_jax.weights.base import load_model

    loaded: Any = load_model(str(folder), dtype="float32", images=True)
    prepared = [loaded.processor.prepare(image) for image in images[0]]
    patches = []
    shapes = []
    for image in prepared:
        start = 0
        for rows, columns in image.grids:
            end = start + rows * columns
            squares = np.asarray(loaded.processor.normalise(image.pixels[start:end]))
            squares = squares.reshape(rows // 2, columns // 2, 2, 2, -1).transpose(0, 2, 1, 3, 4)
            patches.append(squares.reshape(rows * columns, -1))
            shapes.append((rows, columns))
            start = end
    most = max(map(len, patches))
    pixels = np.zeros((len(patches), most, patches[0].shape[1]), np.float32)
    mask = np.zeros((len(patches), most), np.int32)
    for number, of_view in enumerate(patches):
        pixels[number, : len(of_view)] = of_view
        mask[number, : len(of_view)] = 1
    tokens = loaded.tokenizer.images
    first, *others = texts[0].split("<image>")
    for image, piece in zip(prepared, others, strict=True):
        first += tokens.text_of(image.layout) + piece
    return tokenizer(first, return_tensors="pt", add_special_tokens=False) | {
        "pixel_values": torch.tensor(pixels),
        "pixel_attention_mask": torch.tensor(mask),
        "spatial_shapes": torch.tensor(shapes),
    }


def _pixtral_inputs(config: Any, tokenizer: Any, pixels: Any, texts: list[str], images: Any) -> Any:
    """`tile_inputs` of Mistral 3, whose processor of texts needs torchvision. The text of an image is
    compared with it in `tests/data/images/test_texts.py`."""
    square = config.vision_config.patch_size * config.spatial_merge_size
    made = pixels(images[0], patch_size=square, return_tensors="pt")
    first, *others = texts[0].split("[IMG]")
    for (height, width), piece in zip(made["image_sizes"].tolist(), others, strict=True):
        rows = ["[IMG]" * (width // square)] * (height // square)
        first += "[IMG_BREAK]".join(rows) + "[IMG_END]" + piece
    return tokenizer(first, return_tensors="pt", add_special_tokens=False) | dict(made)


def draw_noise(height: int, width: int) -> Any:
    """A picture of noise."""
    from PIL import Image

    pixels = np.random.default_rng(height * 7919 + width).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def make_chats_of_shapes(folder: Path, count: int = 24, most: int = 60) -> Path:
    """Conversations about pictures of random shapes and three colours, some with two pictures."""
    from PIL import Image

    rng = np.random.default_rng(3)
    names = list(COLOURS)
    lines = []
    for i in range(count):
        parts: list[dict[str, Any]] = []
        for j in range(1 + (i % 3 == 0)):
            height, width = (int(side) for side in rng.integers(8, most, 2))
            noise = rng.normal(0, 25, (height, width, 3))
            pixels = np.clip(np.asarray(COLOURS[names[i % 3]]) + noise, 0, 255)
            name = f"{i}_{j}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            parts.append({"type": "image_url", "image_url": {"url": name}})
        parts.append({"type": "text", "text": QUESTION})
        answer = {"role": "assistant", "content": f"{names[i % 3]} square."}
        lines.append({"messages": [{"role": "user", "content": parts}, answer]})
    path = folder / "shapes.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def make_chats(folder: Path, damaged: str = "") -> Path:
    """Conversations about 48 squares of three colours, in OpenAI's form and in LLaVA's."""
    tiny.make_pictures(folder, COLOURS, count=16, size=(20, 24), damaged=damaged)
    lines: list[dict[str, Any]] = []
    for name in [f"{colour}{i}" for i in range(16) for colour in COLOURS]:
        image, answer = f"{name}.png", f"{name.rstrip('0123456789')} square."
        if len(lines) % 2:
            turns = [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": answer},
            ]
            lines.append({"image": image, "conversations": turns})
        else:
            parts = [
                {"type": "image_url", "image_url": {"url": image}},
                {"type": "text", "text": QUESTION},
            ]
            turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
            lines.append({"messages": turns})
    path = folder / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path
