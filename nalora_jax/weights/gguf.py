"""Reads GGUF files: metadata, tensors (dequantized block by block), the model's ``config.json``,
and its tokenizer.

Block layouts and dequantization come from the ``gguf`` package. Its `GGUFReader` is not used: it
creates several Python objects for every token of the vocabulary (3 s for 49,152 tokens, 10 s for
262,144), and it trusts every count in a damaged file. The header is read here instead, and every
count and offset is checked against the file's size before use.

Metadata is converted to the ``config.json`` of the same model on the hub, so that
`ModelConfig.from_hf` is the only reader of model descriptions. Comments mark values that llama.cpp
hard-codes per architecture instead of storing them.

Two kinds of vocabulary are supported: byte-level BPE ("gpt2", with a list of merges and a named
rule for splitting text first) and SentencePiece BPE ("llama": Llama 2, Mistral, Gemma, Phi-3;
merges follow from the scores).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from nalora_jax.data import tokenizer as ours
from nalora_jax.errors import NaloraError
from nalora_jax.models.family import BUILT_IN, Metadata, nearest
from nalora_jax.models.ropes import RopeSpec, inverse_frequencies
from nalora_jax.weights.model_files import SINGLE_FILES
from nalora_jax.weights.shards import SAFETENSORS_DTYPES, FileTensor
from nalora_jax.weights.tensors import Index, TensorSource, whole

READABLE = (
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
)
# Value types by number; 8 is a string, 9 an array.
_SCALARS = dict(
    enumerate(
        (
            "<u1",
            "<i1",
            "<u2",
            "<i2",
            "<u4",
            "<i4",
            "<f4",
            "?",
            "",
            "",
            "<u8",
            "<i8",
            "<f8",
        )
    )
)
_STRING = 8
_ARRAY = 9
_MAX_ITEMS = 1 << 16  # metadata keys, tensors
# in all arrays; the largest vocabularies and merge lists have 2^18 to 2^19
_MAX_STRINGS = 1 << 22
_MAX_DIMENSIONS = 4


class GGUFFile(TensorSource):
    """A GGUF file, as a `TensorSource`.

    Attributes:
      metadata: values by key: numbers, strings, numpy arrays, or lists of strings.

    Raises:
      NaloraError: not a GGUF file, another version or byte order, or a header that does not fit
        the file.
    """

    readable = READABLE
    remedy = "use another quantization of the model"

    def __init__(self, path: str | Path) -> None:
        """Reads the header of ``path``; tensors are read on demand."""
        self.path = Path(path)
        try:
            with (
                self.path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory,
            ):
                self.metadata, tensors = _read_header(_Cursor(memory, self.path))
        except NaloraError:
            raise
        # ValueError: an empty file cannot be mapped.
        except (OSError, ValueError) as error:
            raise NaloraError(
                str(self.path),
                expected="a GGUF file",
                found=error,
            ) from error
        super().__init__(str(self.path), tensors)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a slice of a tensor: float32, or the file's 16-bit floats."""
        stored = self._tensors[name]
        *lead, columns = index
        if len(lead) == 2 and lead[0].stop == lead[0].start + 1:
            # one expert of [experts, rows, columns]: only the needed rows are dequantized
            start = lead[0].start * stored.shape[1]
            rows = self._rows(stored, start + lead[1].start, start + lead[1].stop)
            return rows[None, :, columns]
        if not lead:
            return self._rows(stored, 0, 1).reshape(stored.shape)[columns]
        first, *inner = lead
        # rows of bytes in one row of the tensor
        per_row = math.prod(stored.shape[1:-1])
        flat = self._rows(stored, first.start * per_row, first.stop * per_row)
        return flat.reshape(-1, *stored.shape[1:])[(slice(None), *inner, columns)]

    def whole(self, name: str) -> np.ndarray:
        """Returns a small tensor as float64."""
        self.check_readable(name)
        return self.read(name, whole(self._shapes[name])).astype(np.float64)

    def about(self, prefix: str) -> Metadata:
        """Returns the metadata whose keys begin with ``prefix``."""
        return Metadata(self.metadata, prefix, self.where)

    def _rows(self, stored: FileTensor, start: int, stop: int) -> np.ndarray:
        """Returns dequantized rows along the last axis: ``[stop - start, shape[-1]]``."""
        row = stored.size // math.prod(stored.shape[:-1])
        # Read, not mapped: a mapped file's pages would count as this process's memory.
        data = stored.read(start * row, (stop - start) * row)
        raw = data.reshape(stop - start, row)
        if stored.format in ("F16", "BF16"):
            return raw.view(SAFETENSORS_DTYPES[stored.format])
        return dequantize(raw, GGMLQuantizationType[stored.format])


# ---------------------------------------------------------------- the header


class _Cursor:
    """A reader that moves forward through a mapped file and checks its end."""

    def __init__(self, memory: mmap.mmap, path: Path) -> None:
        self.memory = memory
        self.path = path
        self.size = len(memory)
        self.at = 0
        self.strings_left = _MAX_STRINGS

    def error(self, expected: object, actual: object) -> NaloraError:
        remedy = "download the file again: it is truncated or damaged"
        where = f"{self.path}: GGUF header, byte {self.at}"
        return NaloraError(where, expected=expected, found=actual, remedy=remedy)

    def skip(self, count: int) -> int:
        """Skips ``count`` bytes, which must be in the file, and returns their start."""
        if count > self.size - self.at:
            raise self.error(
                f"{count} more bytes",
                f"{self.size - self.at} until the end of the file",
            )
        self.at += count
        return self.at - count

    def numbers(self, form: str) -> tuple[Any, ...]:
        """Reads numbers in the notation of ``struct``, e.g. "<IQ"."""
        return struct.unpack_from(form, self.memory, self.skip(struct.calcsize(form)))

    def count(self, limit: int, what: str) -> int:
        """Reads a count of items that take at least one byte each."""
        (count,) = self.numbers("<Q")
        most = min(limit, self.size - self.at)
        if count > most:
            raise self.error(f"at most {most} {what}", count)
        return int(count)

    def string(self) -> str:
        """Reads a string: its length as uint64, then UTF-8."""
        (length,) = self.numbers("<Q")
        start = self.skip(length)
        try:
            return self.memory[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error("a UTF-8 string", error.reason) from error

    def value(self) -> Any:
        """Reads the type of a metadata value, then the value.

        Returns a number, bool or string; for an array a NumPy array or a list of strings.
        """
        (kind,) = self.numbers("<I")
        if kind == _STRING:
            return self.string()
        expected = "a value type of GGUF"
        array = kind == _ARRAY
        if array:
            expected = "an array of numbers or strings"
            (kind,) = self.numbers("<I")
            if kind == _STRING:
                count = self.count(self.strings_left, "strings")
                self.strings_left -= count
                return [self.string() for _ in range(count)]
        if not _SCALARS.get(kind):
            raise self.error(expected, f"type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        if array:
            return self._array(dtype, self.count(self.size, "numbers"))
        (value,) = self._array(dtype, 1)
        # the decimal that it was written from: 1e-05, not 9.999999747378752e-06
        if dtype == np.float32:
            return float(str(value))
        return value.item()

    def _array(self, dtype: np.dtype, count: int) -> np.ndarray:
        start = self.skip(count * dtype.itemsize)
        return np.frombuffer(self.memory, dtype, count, start).copy()


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, FileTensor]]:
    """Returns the metadata by key, and the tensors by name.

    Raises:
      NaloraError: not a complete model in a little-endian GGUF file of version 2 or 3, or a key or
        value that is not valid.
    """
    where = str(cursor.path)
    magic = cursor.memory[cursor.skip(4) : 4]
    if magic != b"GGUF":
        raise NaloraError(
            where,
            expected="a GGUF file",
            found=f"a file that begins with {magic!r}",
        )
    (version,) = cursor.numbers("<I")
    if version not in (2, 3):
        actual = f"version {version}"
        # 2 or 3 in the other byte order is 2 << 24 or 3 << 24.
        if version >= 1 << 16:
            actual = "a big-endian file or a damaged version number"
        raise NaloraError(
            where,
            expected="GGUF version 2 or 3, little-endian",
            found=actual,
        )
    n_tensors = cursor.count(_MAX_ITEMS, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count(_MAX_ITEMS, "metadata keys")):
        key = cursor.string()
        if key in metadata:
            raise cursor.error("each key once", f"{key} again")
        metadata[key] = cursor.value()
    if metadata.get("split.count", 1) != 1:
        found = f"a part of {metadata['split.count']}"
        remedy = "llama.cpp's llama-gguf-split --merge"
        raise NaloraError(
            where,
            expected="a model in one file",
            found=found,
            remedy=f"join the parts with {remedy}",
        )
    alignment = metadata.get("general.alignment", 32)
    return metadata, _read_tensor_table(cursor, n_tensors, alignment)


def _read_tensor_table(
    cursor: _Cursor, count: int, alignment: object
) -> dict[str, FileTensor]:
    """Returns the tensors by name, with positions counted from the beginning of the file.

    Args:
      cursor: at the first of ``count`` entries.
      count: number of tensors.
      alignment: ``general.alignment``; the data start at a multiple of this many bytes.

    Raises:
      NaloraError: an entry is not valid, or its data extend beyond the end of the file.
    """
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error("a power of two as general.alignment", alignment)
    tensors: dict[str, FileTensor] = {}
    for _ in range(count):
        name = cursor.string()
        (dimensions,) = cursor.numbers("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise cursor.error(f"{name}: 1 to {_MAX_DIMENSIONS} dimensions", dimensions)
        # GGUF lists the fastest axis first.
        shape = cursor.numbers(f"<{dimensions}Q")[::-1]
        number, offset = cursor.numbers("<IQ")
        if min(shape) < 1:
            raise cursor.error(f"{name}: dimensions of 1 or more", shape)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise cursor.error(f"{name}: a tensor type of GGUF", number) from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise cursor.error(
                f"{name}: rows of whole {kind.name} blocks of {block}",
                f"rows of {shape[-1]}",
            )
        if name in tensors:
            raise cursor.error("each tensor once", f"{name} again")
        size = math.prod(shape) // block * block_bytes
        tensors[name] = FileTensor(
            cursor.path,
            shape,
            kind.name,
            offset,
            size,
        )
    # of the data, which offsets are relative to
    start = -(-cursor.at // alignment) * alignment
    for name, tensor in tensors.items():
        tensors[name] = replace(tensor, start=start + tensor.start)
        beyond = start + tensor.start + tensor.size - cursor.size
        if beyond > 0:
            raise cursor.error(
                f"{name} to end within the file",
                f"its end {beyond} bytes beyond",
            )
    return tensors


# ---------------------------------------------------------------- the description


_SPECIAL = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """Returns the ``config.json`` of the model in ``file``.

    Raises:
      NaloraError: an unsupported architecture, or a metadata key that is missing or has the wrong
        type.
    """
    architecture = file.about("general").get("architecture", str)
    formats = {family.name: family.gguf for family in BUILT_IN.values() if family.gguf}
    known = {form.architecture: name for name, form in formats.items()}
    if architecture not in known:
        raise NaloraError(
            f"{file.path}: general.architecture",
            expected=f"one of {', '.join(known)}",
            found=repr(architecture),
            remedy=nearest(architecture, known),
        )
    reader = _Model(file, architecture)
    name, form = next(
        (name, form)
        for name, form in formats.items()
        if form.architecture == architecture and form.matches(reader)
    )
    raw = {
        "architectures": [BUILT_IN[name].class_name],
        "model_type": name,
        **_shape(reader),
        **_rope(reader),
    }
    raw |= form.settings(reader)
    tokenizer = file.about("tokenizer.ggml")
    for key, theirs in _SPECIAL.items():
        if tokenizer.has(theirs):
            raw[key] = tokenizer.get(theirs, int)
    return raw


class _Model(Metadata):
    """Metadata of one architecture, with the file's small tensors."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        super().__init__(file.metadata, architecture, file.where)
        self.file = file

    def tensor(self, name: str) -> np.ndarray | None:
        """Returns a small tensor as float64, or None."""
        if name not in self.file.shapes():
            return None
        return self.file.whole(name)


def _shape(r: _Model) -> dict[str, Any]:
    """Returns the model's sizes, from the same keys and tensors as llama.cpp."""
    width = r.get("embedding_length", int)
    heads = r.get("attention.head_count", int)
    vocabulary = r.file.shapes().get("token_embd.weight")
    if vocabulary is None:
        raise NaloraError(
            r.where,
            expected="the tensor token_embd.weight",
            found="none of that name",
        )
    if heads < 1:
        raise r.error("attention.head_count", "1 or more", heads)
    raw = {
        "vocab_size": vocabulary[0],
        "hidden_size": width,
        "num_hidden_layers": r.get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": r.get("attention.head_count_kv", int, heads),
        "head_dim": r.get("attention.key_length", int, width // heads),
        "max_position_embeddings": r.get("context_length", int),
        "rms_norm_eps": r.get("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in r.file.shapes(),
        "attention_bias": "blk.0.attn_q.bias" in r.file.shapes(),
        "mlp_bias": "blk.0.ffn_up.bias" in r.file.shapes(),
    }
    if r.has("attention.causal"):
        raw["is_causal"] = r.get("attention.causal", bool)
    if r.has("feed_forward_length"):
        raw["intermediate_size"] = r.get("feed_forward_length", int)
    return raw


# ---------------------------------------------------------------- rotary embeddings


def _rope(r: _Model) -> dict[str, Any]:
    """Returns the fields of ``config.json`` for rotary embeddings, with llama.cpp's defaults."""
    theta = r.get("rope.freq_base", float, 10_000.0)
    head_dim = r.get("attention.key_length", int, 0)
    rotated = r.get("rope.dimension_count", int, head_dim)
    raw: dict[str, Any] = {"rope_theta": theta}
    if head_dim and rotated != head_dim:
        raw["partial_rotary_factor"] = rotated / head_dim
    if scaling := _long_factors(r) or _frequency_factors(r, theta) or r.scaling():
        raw["rope_scaling"] = scaling
    return raw


def _long_factors(r: _Model) -> dict[str, Any] | None:
    """Returns LongRoPE's settings; its two lists of divisors are tensors in the file."""
    short = r.tensor("rope_factors_short.weight")
    long = r.tensor("rope_factors_long.weight")
    if short is None or long is None:
        return None
    context = r.get("rope.scaling.original_context_length", int)
    scaling = {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": context,
    }
    if r.has("rope.scaling.attn_factor"):
        scaling["attention_factor"] = r.get("rope.scaling.attn_factor", float)
    return scaling


def _frequency_factors(r: _Model, theta: float) -> dict[str, Any] | None:
    """Returns Llama 3's scaling, which is stored as one divisor per frequency.

    Divisors that do not match Llama 3's formula are returned as LongRoPE lists.
    """
    divisors = r.tensor("rope_freqs.weight")
    if divisors is None:
        return None
    plain = RopeSpec(dim=2 * divisors.size, theta=theta)
    # Llama 3.1, 3.2 and 3.3 share these settings; the largest divisor is the scaling factor.
    spec = replace(
        plain, kind="llama3", factor=float(divisors.max()), max_positions=8192
    )
    expected = inverse_frequencies(plain) / inverse_frequencies(spec)
    if np.allclose(expected, divisors, rtol=1e-4):
        return {
            "rope_type": "llama3",
            "factor": spec.factor,
            "low_freq_factor": spec.low_freq_factor,
            "high_freq_factor": spec.high_freq_factor,
            "original_max_position_embeddings": spec.max_positions,
        }
    return {
        "rope_type": "longrope",
        "attention_factor": 1.0,
        "original_max_position_embeddings": r.get("context_length", int),
        **dict.fromkeys(("short_factor", "long_factor"), divisors.tolist()),
    }


# ---------------------------------------------------------------- the tokenizer


_CONTROL = 3
_USER_DEFINED = 4
_SPACE = "▁"
# Stop tokens by name: metadata has one end-of-sequence id, but chat models also stop at others.
_STOPS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Three rules, one after the other.
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# tokenizer.ggml.pre -> the expression that cuts text into words; "" is GPT-2's rule, "digits" the
# same after splitting off single digits
_SPLITS: dict[str, str | tuple[str, ...]] = {
    "": "",
    "default": "",
    "gpt-2": "",
    "smollm": "digits",
    "refact": "digits",  # Granite
    "starcoder": "digits",
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "dbrx": _LLAMA3,  # OLMo 2
    "glm4": _LLAMA3,
    "deepseek-v3": _DEEPSEEK3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
# Vocabularies in which a word that is a token takes precedence over the result of the merges.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "tekken")


def open_gguf(path: Path) -> tuple[GGUFFile, dict[str, Any], ours.Tokenizer]:
    """Opens a GGUF file: its tensors, what its ``config.json`` would be, and its tokenizer."""
    file = GGUFFile(path)
    return file, hf_config(file), read_tokenizer(file)


SINGLE_FILES["gguf"] = open_gguf


def read_tokenizer(file: GGUFFile) -> ours.Tokenizer:
    """Builds the tokenizer in ``file``.

    Raises:
      NaloraError: an unknown kind of vocabulary or splitting rule, or inconsistent metadata.
    """
    about = file.about("tokenizer.ggml")
    kind = about.get("model", str)
    tokens = about.get("tokens", list)
    if kind not in ("gpt2", "llama"):
        raise about.error(
            "model",
            "gpt2 (byte-level BPE) or llama (SentencePiece BPE)",
            repr(kind),
        )
    try:
        if kind == "gpt2":
            backend = _byte_level(about, tokens)
        else:
            architecture = file.about("general").get("architecture", str)
            backend = _sentencepiece(about, tokens, architecture)
        kinds = _numbers(about, "token_type", len(tokens), default=1)
        _add_special(backend, tokens, kinds)
    except NaloraError:
        raise
    # The binding raises Exceptions, and panics (BaseException).
    except BaseException as error:
        if ours.is_foreign(error):
            raise about.error(
                "tokens",
                "a vocabulary and merges that fit together",
                error,
            ) from error
        raise
    return _wrap(file, about, backend, tokens, adds_bos=kind == "llama")


def _wrap(
    file: GGUFFile,
    about: Metadata,
    backend: Tokenizer,
    tokens: list[str],
    *,
    adds_bos: bool,
) -> ours.Tokenizer:
    """Returns the tokenizer with special and stop tokens, and chat templates.

    Args:
      file: has the chat templates.
      about: metadata of the tokenizer.
      backend: the tokenizer without these.
      tokens: texts by id.
      adds_bos: whether text begins with the BOS token if the metadata do not say so.
    """
    names = {
        "bos": "bos",
        "eos": "eos",
        "unk": "unknown",
        "pad": "padding",
        "eot": "eot",
        "eom": "eom",
    }
    ids: dict[str, int] = {}
    for name, theirs in names.items():
        token_id = _token_id(about, f"{theirs}_token_id", len(tokens))
        if token_id is not None:
            ids[name] = token_id
    if "eos" not in ids:
        raise about.error(
            "eos_token_id",
            "the id of the token that ends a text",
            "no such key",
        )
    by_name = [backend.token_to_id(name) for name in _STOPS]
    # eot (end of turn) and eom (end of message) are stop tokens only, so they leave `ids`.
    stops = [ids["eos"], *(ids.pop(name) for name in ("eot", "eom") if name in ids)]
    stops += [token_id for token_id in by_name if token_id is not None]
    return ours.Tokenizer(
        backend=backend,
        bos_id=ids.get("bos"),
        eos_id=ids["eos"],
        pad_id=ids.get("pad", ids["eos"]),
        eos_ids=tuple(dict.fromkeys(stops)),
        chat_template=_text(file, "tokenizer.chat_template"),
        tool_template=_text(file, "tokenizer.chat_template.tool_use"),
        add_bos="bos" in ids and about.get("add_bos_token", bool, adds_bos),
        special_tokens={
            f"{name}_token": tokens[token_id] for name, token_id in ids.items()
        },
    )


def _text(file: GGUFFile, key: str) -> str | None:
    value = file.metadata.get(key)
    if isinstance(value, str):
        return value
    return None


# ---------------------------------------------------------------- byte-level BPE


def _byte_level(about: Metadata, tokens: list[str]) -> Tokenizer:
    """Builds a byte-level BPE tokenizer without special tokens.

    Args:
      about: metadata of the tokenizer: merges, and the name of the splitting rule.
      tokens: texts by id.
    """
    rule = about.get("pre", str, "")
    if rule not in _SPLITS:
        known = ", ".join(filter(None, _SPLITS))
        raise about.error("pre", f"one of {known}", repr(rule))
    listed = about.get("merges", list)
    if any(pair.count(" ") != 1 for pair in listed):
        raise about.error("merges", "two tokens and one space in each", "another form")
    merges = []
    for pair in listed:
        left, _, right = pair.partition(" ")
        merges.append((left, right))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule in _WHOLE_WORDS)
    )
    backend.pre_tokenizer = _splitter(_SPLITS[rule])
    if _SPLITS[rule] == _QWEN2:  # its tokenizer.json composes characters first
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _splitter(rule: str | tuple[str, ...]) -> Any:
    """Returns the pre-tokenizer of a rule of `_SPLITS`.

    "" and "digits" use the GPT-2 expression that ByteLevel contains; the others are expressions.
    """
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=rule in ("", "digits")
    )
    if rule == "":
        return byte_level
    if rule == "digits":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    rules = (rule,) if isinstance(rule, str) else rule
    splits: list[Any] = [
        pre_tokenizers.Split(Regex(each), behavior="isolated") for each in rules
    ]
    return pre_tokenizers.Sequence([*splits, byte_level])


# ---------------------------------------------------------------- SentencePiece BPE


def _sentencepiece(about: Metadata, tokens: list[str], architecture: str) -> Tokenizer:
    """Builds a SentencePiece BPE tokenizer without special tokens.

    Args:
      about: metadata of the tokenizer: scores, token types, unknown token.
      tokens: texts by id.
      architecture: of the model; Phi-3 treats spaces in another way than the others.
    """
    token_set = set(tokens)
    # GGUF files write runs of spaces as spaces; the tokenizer needs SentencePiece's visible mark.
    spelled = []
    for token in tokens:
        marks = _SPACE * len(token)
        if token and not token.strip(" ") and marks not in token_set:
            spelled.append(marks)
        else:
            spelled.append(token)
    kinds = _numbers(about, "token_type", len(tokens), default=1)
    scores = _numbers(about, "scores", len(tokens), default=0)
    vocabulary = {token: i for i, token in enumerate(spelled)}
    unknown = _token_id(about, "unknown_token_id", len(tokens))
    unknown_token = None
    if unknown is not None:
        unknown_token = spelled[unknown]
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_from_scores(vocabulary, spelled, scores, kinds),
            unk_token=unknown_token,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    prefix = about.get("add_space_prefix", bool, True)
    if prefix:
        steps.append(decoders.Strip(" ", left=1))
    if not prefix:
        backend.normalizer = normalizers.Replace(" ", _SPACE)
    elif architecture == "phi3":
        # As in its tokenizer.json: a space precedes every piece of text.
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            _SPACE, prepend_scheme="first", split=False
        )
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_from_scores(
    vocabulary: dict[str, int],
    tokens: Sequence[str],
    scores: np.ndarray,
    kinds: np.ndarray,
) -> list[tuple[str, str]]:
    """Returns every split of a token into two tokens: the best token's first, and longest left part
    first.

    SentencePiece merges the pair whose result has the highest score; of equal scores the first
    token in the file is used. User-defined tokens have no meaningful score and come before all
    others, as in the models' merge lists.
    """
    # The last key is the first criterion: user-defined, then score, then id.
    order = np.lexsort((np.arange(len(tokens)), -scores, kinds != _USER_DEFINED))
    merges = []
    for i in order.tolist():
        token = tokens[i]
        for k in range(len(token) - 1, 0, -1):
            if token[:k] in vocabulary and token[k:] in vocabulary:
                merges.append((token[:k], token[k:]))
    return merges


# ---------------------------------------------------------------- metadata


def _add_special(backend: Tokenizer, tokens: list[str], kinds: np.ndarray) -> None:
    """Registers control and user-defined tokens, which are recognized before any text is split."""
    for kind, add in (
        (_CONTROL, backend.add_special_tokens),
        (_USER_DEFINED, backend.add_tokens),
    ):
        special = kind == _CONTROL
        added = []
        for i in np.flatnonzero(kinds == kind):
            token = tokens[i]
            # A token that the vocabulary lacks would get a new id.
            if backend.token_to_id(token) is not None:
                added.append(AddedToken(token, normalized=False, special=special))
        add(added)


def _numbers(about: Metadata, name: str, length: int, *, default: float) -> np.ndarray:
    """Returns one number per token: ``[length]``; ``default`` if the key is missing."""
    if not about.has(name):
        return np.full(length, default)
    value: np.ndarray = about.get(name, np.ndarray)
    if value.size != length:
        raise about.error(name, f"{length} numbers, one per token", value.size)
    return value


def _token_id(about: Metadata, name: str, length: int) -> int | None:
    """Returns a token's id, below ``length``; None if the metadata do not have it."""
    if not about.has(name):
        return None
    value: int = about.get(name, int)
    if not 0 <= value < length:
        raise about.error(name, f"an id below {length}", value)
    return value
