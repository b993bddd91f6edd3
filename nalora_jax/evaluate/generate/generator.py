"""Text generation with a model: batches of prompts, or one streamed prompt."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from jax.sharding import Mesh

from nalora_jax.config.settings import GenerationConfig
from nalora_jax.config.structured import ranges
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.evaluator import SAMPLE_TOKENS, Answers
from nalora_jax.evaluate.generate.programs import (
    NO_TOKEN,
    Prompts,
    State,
    bucket,
    decode,
    encode_images,
    padded_length,
    padded_rows,
    prefill,
    view_weights,
)
from nalora_jax.evaluate.generate.sampling import make_sampling
from nalora_jax.mesh.distributed import place_batch, prompt_shards
from nalora_jax.mesh.processes import fetch
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.ropes import switch_length

if TYPE_CHECKING:
    from nalora_jax.data.images.image_chat import AnyProcessor


@dataclass(frozen=True)
class GenerationSettings(GenerationConfig):
    """Settings of generation."""

    # Samples are a function of seed, prompt and weights; a sequence has one seed per prompt.
    seed: int | Sequence[int] = 0
    # Texts that end the completion and are not part of it. If a text starts with a special token,
    # that token ends the completion.
    stop: str | Sequence[str] = ()
    # Tokens that end the completion; None: the tokenizer's end-of-text tokens.
    stop_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Raises a NaloraError that names the first setting out of range."""
        for name, allowed in ranges(GenerationSettings).items():
            value = getattr(self, name)
            require_setting(name, allowed.holds(value), str(allowed), value)
        are_texts = isinstance(self.stop, Sequence)
        if are_texts:
            are_texts = all(isinstance(text, str) for text in self.stop)
        require_setting("stop", are_texts, "a text, or texts", self.stop)
        seeds: Any = [self.seed]
        if isinstance(self.seed, Sequence | np.ndarray):
            seeds = self.seed
        are_whole = all(isinstance(seed, Integral) for seed in seeds)
        expected = "a whole number, or one for each prompt"
        require_setting("seed", are_whole, expected, self.seed)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Returns ``stop`` as a tuple."""
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(self.stop)

    def seeds(self, count: int) -> tuple[int, ...]:
        """Returns one seed for each of ``count`` prompts."""
        if not isinstance(self.seed, Sequence):
            return (int(self.seed),) * count
        require_setting(
            "seed",
            len(self.seed) == count,
            f"one number, or {count}: one for each prompt",
            len(self.seed),
        )
        return tuple(self.seed)


def require_setting(
    setting: str,
    holds: bool,
    expected: str,
    value: object,
) -> None:
    """Raises a NaloraError about a setting's value unless ``holds`` is true."""
    if not holds:
        raise NaloraError(setting, expected=expected, found=value)


Function = TypeVar("Function", bound=Callable[..., Any])


def accept_options(settings: type) -> Callable[[Function], Function]:
    """Returns a decorator for functions with ``**settings``, the fields of a dataclass.

    `inspect.signature` and editors then show the fields as keyword arguments.
    """

    def decorate(function: Function) -> Function:
        """Returns ``function`` itself with the new signature."""
        signature = inspect.signature(function)
        parameters = []
        for parameter in signature.parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD:
                parameters.append(parameter)
        for option in fields(settings):
            parameter = inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=option.default,
                annotation=option.type,
            )
            parameters.append(parameter)
        documented: Any = function
        documented.__signature__ = signature.replace(parameters=parameters)
        return function

    return decorate


# ---------------------------------------------------------------- streamed text

# Decoders write it for bytes that do not (yet) form a character.
_REPLACEMENT = "\ufffd"


class TextStream:
    """Converts pieces of token ids to pieces of text, whose concatenation is the text of all ids.

    Text that may still change is held back: an incomplete character, or the beginning of a stop
    string. A stop string and all text after it are dropped.

    Example (a tokenizer of bytes; "é" is two bytes):
      >>> stream = TextStream(tokenizer, stop=("END",))
      >>> [stream.push(ids) for ids in ([99, 195], [169, 69], [78, 33])], stream.finish()
      (['c', 'é', 'EN!'], '')
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()) -> None:
        """Starts a stream without tokens that ends at the first of the texts ``stop``."""
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self.ids: list[int] = []
        # Decoding starts some tokens back, never at the newest: decoders treat a first token
        # specially.
        self._start = 0
        self._complete = 0  # tokens before this end in a whole character
        self._shown = 0  # characters since `_start` that were returned or held back
        self._held = ""  # possibly the beginning of a stop string
        self.stopped = False

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that is final after ``ids``."""
        if self.stopped:
            return ""
        self.ids.extend(ids)
        return self._release(self._take(final=False), final=False)

    def finish(self) -> str:
        """Returns the text that was held back."""
        if self.stopped:
            return ""
        return self._release(self._take(final=True), final=True)

    def _take(self, *, final: bool) -> str:
        """Returns new characters of the decoded text, without an incomplete one at its end.

        Each call decodes the tokens from `_start`, so that a long text is not decoded anew for
        every token. If the text ends in a complete character, `_start` moves to the previous such
        place, not to this one: some tokenizers decode a token differently without the one before.
        """
        text = self._tokenizer.decode(self.ids[self._start :])
        stable = text
        if not final:
            stable = text.rstrip(_REPLACEMENT)
        piece = stable[self._shown :]
        self._shown = max(self._shown, len(stable))
        if len(stable) == len(text):
            self._start = self._complete
            self._complete = len(self.ids)
            self._shown = len(self._tokenizer.decode(self.ids[self._start :]))
        return piece

    def _release(self, piece: str, *, final: bool) -> str:
        """Returns the text of ``piece`` and what was held back, up to a stop string.

        Unless it is ``final``, the possible beginning of a stop string is held back.
        """
        text = self._held + piece
        ends = [text.find(stop) for stop in self._stop if stop in text]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)]
        held = 0
        if not final:
            held = max((_begun(text, stop) for stop in self._stop), default=0)
        end = len(text) - held
        self._held = text[end:]
        return text[:end]


def _begun(text: str, stop: str) -> int:
    """Returns the number of characters at the end of a text that may begin a stop string."""
    for size in range(len(stop) - 1, 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def special_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> frozenset[int]:
    """Returns the ids of special tokens at the start of stop strings, after white space.

    Decoded text has no special tokens, so such a string can only be detected by the token.
    """
    texts = [stop.lstrip() for stop in stops]
    ids = set()
    for number, token in tokenizer.backend.get_added_tokens_decoder().items():
        if not token.special or not token.content:
            continue
        if any(text.startswith(token.content) for text in texts):
            ids.add(number)
    return frozenset(ids)


# ---------------------------------------------------------------- generation

TextOrTokens = str | Sequence[int]  # a text, or its token ids
PromptImages = Sequence[Any]  # of one prompt, as the processor prepares them

# Tokens per call. Calls are cheap, so these are small, for smooth streams and early stops.
_STREAM_TOKENS = 4
_BATCH_TOKENS = 32  # also the maximum of one call
PREFILL_CHUNK = 2048


@dataclass(frozen=True)
class Completion:
    """The model's completion of one prompt."""

    text: str
    # Without the stop token. If a stop text ended it: the tokens whose text is part of `text`,
    # without a token that extends into the stop text.
    ids: tuple[int, ...]
    # a stop token or text, or the maximum number of tokens
    reason: Literal["stop", "length"]


def make_completer(
    model: Decoder,
    tokenizer: Tokenizer,
    mesh: Mesh | None = None,
    processor: AnyProcessor | None = None,
) -> Answers:
    """Returns a function that completes prompts for the samples of an evaluator.

    Args:
      model, tokenizer, mesh, processor: as for `Generator`.
    """

    def answers(
        variables: Mapping[str, Any],
        prompts: Sequence[Sequence[int]],
        images: Sequence[Any] | None,
    ) -> list[Completion]:
        """Returns greedy completions of up to `SAMPLE_TOKENS` tokens."""
        generator = Generator(
            model, variables, tokenizer, mesh=mesh, processor=processor
        )
        return generator.complete(prompts, images=images, max_new_tokens=SAMPLE_TOKENS)

    return answers


class Generator:
    """A model that generates completions of prompts.

    Example:
      >>> generator = Generator(model, {"params": params, "lora": lora}, tokenizer)
      >>> generator.generate(["The capital of France is"], max_new_tokens=8)
      [' Paris.']

    Programs are compiled once per bucket of batch, prompt length and total length, and shared by
    all generators of the same model, so `with_lora` does not compile.

    Args:
      model: the decoder.
      variables: ``{"params": ...}``, and ``"lora"`` if there are adapters.
      tokenizer: tokenizer of the model.
      max_length: maximum length of prompt plus completion; the model's context by default.
      mesh: mesh of the weights, if they are sharded; prompts are split over its data axes.
      processor: image processor of a vision-language model.
      prefill_chunk: tokens of a prompt that are processed at a time, so that the memory of
        activations does not grow with longer prompts. Tokens of an image that see each other stay
        in a chunk.
    """

    def __init__(
        self,
        model: Decoder,
        variables: Mapping[str, Any],
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        mesh: Mesh | None = None,
        processor: AnyProcessor | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        """Converts the weights for the programs.

        Raises:
          NaloraError: ``max_length`` or ``prefill_chunk`` is too small.
        """
        self.prefill_chunk = prefill_chunk
        self.model = model
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.processor = processor
        context = model.config.max_positions
        if max_length is None:
            self.max_length = context
        else:
            self.max_length = min(max_length, context)
        require_setting("max_length", self.max_length > 1, "at least 2", max_length)
        require_setting(
            "prefill_chunk", prefill_chunk >= 1, "at least 1", prefill_chunk
        )
        self.variables = variables
        self._weights = view_weights(model, variables)

    def with_lora(self, lora: Any) -> Generator:
        """Returns a generator with another adapter of the same shape (None: the base).

        It does not compile.
        """
        variables = dict(self.variables)
        variables.pop("lora", None)
        if lora is not None:
            variables["lora"] = lora
        generator = copy.copy(self)
        generator.variables = variables
        generator._weights = view_weights(self.model, variables)
        return generator

    @accept_options(GenerationSettings)
    def generate(
        self,
        prompts: Sequence[TextOrTokens],
        *,
        batch_size: int = 16,
        images: Sequence[PromptImages] | None = None,
        **settings: Any,
    ) -> list[str]:
        """Returns the completion of each prompt, without the prompt.

        Args:
          prompts: texts, or token ids.
          batch_size: prompts per batch.
          images: the images of each prompt, processed (uint8 ``[height, width, 3]`` of the model's
            processor), in the order of its image tokens.
          **settings: the fields of `GenerationSettings`.

        Raises:
          NaloraError: a prompt is empty or fills the context, a setting is out of range, or a
            prompt's number of images differs from the number in its tokens.
        """
        completions = self.complete(
            prompts,
            batch_size=batch_size,
            images=images,
            **settings,
        )
        return [completion.text for completion in completions]

    @accept_options(GenerationSettings)
    def complete(
        self,
        prompts: Sequence[TextOrTokens],
        *,
        batch_size: int = 16,
        images: Sequence[PromptImages] | None = None,
        **settings: Any,
    ) -> list[Completion]:
        """Returns completions like `generate`, with token ids and the reason for their end."""
        chosen = GenerationSettings(**settings)
        ids = [self._encode(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        seeds = chosen.seeds(len(ids))
        require_setting("batch_size", batch_size >= 1, "at least 1", batch_size)
        if images is None:
            images = [() for _ in ids]
        expected = f"a list of images for each of {len(ids)} prompts"
        require_setting("images", len(images) == len(ids), expected, len(images))
        for number, (row, images_of_row) in enumerate(zip(ids, images, strict=True)):
            self._check_images(row, images_of_row, f"prompt {number}")
        # batches of similar lengths
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = _Batch(
                self,
                ids=[ids[i] for i in rows],
                settings=chosen,
                seeds=[seeds[i] for i in rows],
                images=[images[i] for i in rows],
            )
            completions |= zip(rows, batch.run(), strict=True)
        return [completions[i] for i in range(len(ids))]

    @accept_options(GenerationSettings)
    def stream(
        self, prompt: TextOrTokens, *, images: PromptImages = (), **settings: Any
    ) -> Iterator[str]:
        """Yields pieces of the completion; joined, they equal the result of `generate`.

        A piece has no incomplete character and no part of a stop text. Errors are raised like in
        `generate`, at the call.
        """
        chosen = GenerationSettings(**settings)
        ids = self._encode(prompt, "prompt")
        self._check_images(ids, images, "prompt")
        batch = _Batch(self, [ids], chosen, chosen.seeds(1), [images])
        return (pieces[0] for pieces in batch.pieces(_STREAM_TOKENS) if pieces[0])

    def _check_images(
        self,
        ids: Sequence[int],
        images: PromptImages,
        where: str,
    ) -> None:
        """Raises an error unless the prompt ``ids`` has as many image tokens as its images need.

        A language model takes no images.
        """
        tokens = self.tokenizer.images
        count = len(images)
        if tokens is None or self.processor is None:
            found = f"{count} for a language model"
            require_setting(
                "images", not images, "a vision-language model, for images", found
            )
            return
        places = ids.count(tokens.token_id)
        if tokens.sized:
            processor: Any = self.processor
            layouts = processor.layouts_of_prepared(images)
            needed = sum(layout.tokens for layout in layouts)
            if places != needed:
                expected = f"{needed} tokens {tokens.token!r} for {count} images"
                raise NaloraError(where, expected=expected, found=places)
        elif places != count * tokens.count:
            raise NaloraError(
                where,
                expected=f"{tokens.count} tokens {tokens.token!r} for each of {count} images",
                found=places,
            )

    def _encode(self, prompt: TextOrTokens, where: str) -> list[int]:
        """Returns the token ids of a prompt.

        Raises:
          NaloraError: it is empty, has ids outside of the vocabulary, or fills the context.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = list(prompt)
        if not prompt or not ids:
            raise NaloraError(
                where,
                expected="a text",
                found="an empty one",
                remedy="write a prompt to continue",
            )
        vocab = self.model.config.vocab_size
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise NaloraError(
                where,
                expected=f"token ids of the model, 0 to {vocab - 1}",
                found=f"{min(ids)} to {max(ids)}",
                remedy="use the model's own tokenizer",
            )
        if len(ids) >= self.max_length:
            raise NaloraError(
                where,
                expected=f"fewer than {self.max_length} tokens (the context)",
                found=len(ids),
                remedy="shorten it",
            )
        return ids


# settings of `make_sampling`
SAMPLED = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
)


class _Batch:
    """Prompts that are completed together.

    Args:
      generator: the model.
      ids: token ids of each prompt.
      settings: of generation.
      seeds: one for each prompt.
      images: processed images of each prompt.
    """

    def __init__(
        self,
        generator: Generator,
        ids: Sequence[list[int]],
        settings: GenerationSettings,
        seeds: Sequence[int],
        images: Sequence[PromptImages],
    ) -> None:
        """Prepares the programs' arguments and the streams; `run` and `pieces` generate."""
        self._generator = generator
        self._count = len(ids)
        self._has_images = any(images)
        rooms = [generator.max_length - len(row) for row in ids]
        self._limits = np.minimum(
            settings.max_new_tokens, rooms
        )  # new tokens of each prompt
        tokenizer = generator.tokenizer
        stop_texts = settings.stop_texts
        stop_ids = settings.stop_ids
        if stop_ids is None:
            stop_ids = tokenizer.eos_ids
        self._stop_ids = frozenset(stop_ids) | special_stops(tokenizer, stop_texts)
        self._streams = [TextStream(tokenizer, stop_texts) for _ in ids]
        self._ended = np.zeros(len(ids), bool)  # by a stop token or text
        self._prompt_ids = ids
        mesh = generator.mesh
        batch = bucket(len(ids), multiple=prompt_shards(mesh))
        sampling = {name: getattr(settings, name) for name in SAMPLED}
        rows = {
            **self._padded(ids, batch),
            "live": np.arange(batch) < len(ids),
            "sampling": make_sampling(batch, seeds=seeds, **sampling),
        }
        # Padded to a bucket, so that the number of stop ids rarely changes the program.
        stops = sorted(self._stop_ids)
        padded = np.full((bucket(len(stops), minimum=8),), NO_TOKEN, np.int32)
        padded[: len(stops)] = stops
        self._prompts = Prompts(**place_batch(rows, mesh), stop_ids=padded)
        if self._has_images:
            self._prompts = replace(self._prompts, features=self._features(images))

    def _features(self, images: Sequence[PromptImages]) -> Any:
        """Returns the features of every row's images, ``[batch, places, d_model]`` from `see`."""
        generator = self._generator
        assert generator.processor is not None
        spare = self._prompts.tokens.shape[0] - len(images)
        processor: Any = generator.processor
        rows = [processor.together(of_row) for of_row in [*images, *[()] * spare]]
        places = processor.rounded(processor.places(rows))
        on_mesh = place_batch(processor.arrays(rows, places), generator.mesh)
        return encode_images(generator.model, processor, generator._weights, on_mesh)

    def run(self) -> list[Completion]:
        """Returns the completion of each prompt."""
        texts = [""] * len(self._streams)
        for new in self.pieces(_BATCH_TOKENS):  # generates, and fills the streams
            texts = [text + piece for text, piece in zip(texts, new, strict=True)]
        decode = self._generator.tokenizer.decode
        completions = []
        for text, stream, ended in zip(texts, self._streams, self._ended, strict=True):
            ids = stream.ids
            # A stop text ended it: drop the tokens after the completion's text.
            while stream.stopped and ids and len(decode(ids)) > len(text):
                ids = ids[:-1]
            reason: Literal["stop", "length"] = "length"
            if ended:
                reason = "stop"
            completions.append(Completion(text, tuple(ids), reason))
        return completions

    def pieces(self, tokens: int) -> Iterator[list[str]]:
        """Yields each row's new text until all rows have ended.

        Args:
          tokens: largest number of tokens of a piece, at most `_BATCH_TOKENS`.
        """
        generator = self._generator
        limit = int(self._limits.max())
        state = self._prefill(0)
        count = 1  # tokens generated so far
        new_tokens = fetch(state.token)[:, None]
        while True:
            pieces = [self._take(row, new_tokens[row]) for row in range(self._count)]
            counts = np.array([len(stream.ids) for stream in self._streams])
            finished = self._ended | (counts >= self._limits)
            if finished.all() or count >= limit:
                for row, stream in enumerate(self._streams):
                    pieces[row] += stream.finish()
                yield pieces
                return
            yield pieces
            steps = min(tokens, limit - count, self._steps_before_switch(finished))
            if steps:
                spare_rows = state.token.shape[0] - self._count
                padded = np.pad(finished, (0, spare_rows))
                state, new = decode(
                    generator.model,
                    generator._weights,
                    state,
                    self._prompts,
                    place_batch(padded, generator.mesh),
                    np.int32(steps),
                    size=_BATCH_TOKENS,
                )
                new_tokens = fetch(new)[:, :steps]
            else:
                del state  # frees its cache before the new one is allocated
                state = self._prefill(count)
                new_tokens = fetch(state.token)[:, None]
            count += new_tokens.shape[1]

    def _prefill(self, count: int) -> State:
        """Processes the prompts and their ``count`` generated tokens, and generates one more.

        The new cache has room for all remaining tokens.
        """
        generator = self._generator
        prompts = self._prompts
        ids = []
        for prompt_ids, stream in zip(self._prompt_ids, self._streams, strict=True):
            ids.append([*prompt_ids, *stream.ids])
        chunk = self._chunk(ids)
        if count:
            rows = self._padded(ids, prompts.tokens.shape[0])
            prompts = replace(prompts, **place_batch(rows, generator.mesh))
        length = prompts.tokens.shape[1] + int(self._limits.max()) - count
        slots = padded_length(length, minimum=32, chunk=chunk)  # places of the cache
        return prefill(
            generator.model,
            generator._weights,
            prompts,
            np.int32(count),
            slots=slots,
            chunk=chunk,
        )

    def _chunk(self, ids: Sequence[list[int]]) -> int:
        """Returns how many tokens of each prompt are processed at a time; 0: all."""
        chunk = self._generator.prefill_chunk
        if max(map(len, ids)) <= chunk:
            return 0
        return chunk

    def _padded(self, ids: Sequence[list[int]], batch: int) -> dict[str, np.ndarray]:
        """Returns `padded_rows` of prompts, which have gaps if an image would be in two chunks."""
        vision = self._generator.model.config.vision
        uncut = None
        if self._has_images and vision is not None and vision.mutual:
            uncut = vision.image_token
        return padded_rows(ids, batch, chunk=self._chunk(ids), uncut=uncut)

    def _steps_before_switch(self, finished: np.ndarray) -> int:
        """Returns the number of tokens until cached keys of an unfinished row become invalid.

        It is 0 if a row's newest token, which is not yet in the cache, is the first beyond the
        length at which LongRoPE changes its factors.
        """
        switch = switch_length(self._generator.model.config.ropes)
        if switch is None:
            return _BATCH_TOKENS
        steps = _BATCH_TOKENS
        columns = zip(self._prompt_ids, self._streams, finished, strict=True)
        for prompt_ids, stream, ended in columns:
            left = switch + 1 - len(prompt_ids) - len(stream.ids)
            if left >= 0 and not ended:
                steps = min(steps, left)
        return steps

    def _take(self, row: int, new_tokens: np.ndarray) -> str:
        """Returns the new text of a row, and notes whether the row has ended.

        ``new_tokens``, int ``[tokens]``, count up to a stop token and the row's limit.
        """
        if self._ended[row]:
            return ""
        stream = self._streams[row]
        room = self._limits[row] - len(stream.ids)
        tokens = new_tokens[:room].tolist()
        count = 0  # tokens before the first stop token
        while count < len(tokens) and tokens[count] not in self._stop_ids:
            count += 1
        piece = stream.push(tokens[:count])
        self._ended[row] = count < len(tokens) or stream.stopped
        return piece
