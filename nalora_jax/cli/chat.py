"""``nalora chat``: a conversation at the terminal, or with lines from a pipe."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from nalora_jax.cli.outputs import mesh_of, shown_model
from nalora_jax.config import MeshConfig
from nalora_jax.config.settings import GenerationConfig
from nalora_jax.config.structured import MAX_RANK, SEED
from nalora_jax.errors import NaloraError, visible

if TYPE_CHECKING:
    from nalora_jax.evaluate.generate import Generator
    from nalora_jax.evaluate.generate.conversation import Conversation
    from nalora_jax.train.adapted import AdaptedModel
    from nalora_jax.weights.adapter_forms import AdapterSlot

HELP = """\
/image PATH      show an image with the next message, to a model that sees; several one after another
/adapter PATH    answer with another adapter (a run's or a PEFT folder); "none" is the base alone
/system TEXT     another system prompt; without a text, none
/reset           forget what was said; the system prompt stays
/help            this
/exit            end (so does the end of input)"""


def _chat_sampling() -> GenerationConfig:
    """Returns the defaults of a conversation."""
    return GenerationConfig(max_new_tokens=512, temperature=0.7, top_p=0.95)


@dataclass(frozen=True)
class ChatArgs:
    """Chat with a model, or with a model and an adapter; /help lists the other inputs."""

    # Alias, hub id, folder or .gguf file; or the folder of a run: its base model with its adapter.
    model: Positional[str]
    # Adapter folder in PEFT's format, or the folder of a run.
    adapter: Path | None = None
    # System prompt.
    system: str | None = None
    sampling: Annotated[GenerationConfig, arg(name="")] = field(default_factory=_chat_sampling)
    # Seed of the sampling; the n-th response uses this seed plus n.
    seed: Annotated[int, SEED] = 0
    # Adapters up to this rank can be switched without compilation.
    max_lora_rank: Annotated[int, MAX_RANK] = 16
    # Dtype of the base weights. By default the run's, else bfloat16.
    dtype: Literal["bfloat16", "float32"] | None = None
    # Quantize the adapted model's projections. By default as in the run, else not.
    quantize: Literal["none", "int8", "nf4", "mxfp4"] | None = None
    # Devices along each axis of the mesh; -1 or 0 takes whatever is left.
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1, fsdp=1, tensor=1))


def chat(args: ChatArgs) -> None:
    """Reads lines until end of input; streams responses to stdout and messages to stderr."""
    from nalora_jax.evaluate.generate.conversation import Conversation
    from nalora_jax.train.adapted import load

    mesh = mesh_of(args.mesh)
    options: dict[str, Any] = {"dtype": args.dtype, "quantize": args.quantize or "run", "mesh": mesh}
    model = load(args.model, adapter=args.adapter, images=_sees(args), **options)
    if model.base.tokenizer.chat_template is None:
        raise NaloraError(
            args.model,
            expected="a model with a chat template",
            found="none in its tokenizer",
            remedy="use an instruction-tuned model, or nalora generate",
        )
    talk = _Talk(args, model, _Adapters(model, mesh, args.max_lora_rank), Conversation(args.system))
    _say(f"{talk.adapters.name} · /help lists commands")
    for line in _lines():
        if line and not talk.take(line):
            break


def _sees(args: ChatArgs) -> bool:
    """Returns True if the image encoder is to be loaded.

    It is if the model has one, unless the adapter's run did not use it.
    """
    from nalora_jax.config import VisionConfig
    from nalora_jax.train.located import locate
    from nalora_jax.weights.hub import resolve_source
    from nalora_jax.weights.model_files import open_files

    located = locate(args.model, args.adapter)
    if located.run:
        return bool(located.run.get("vision", {}).get("task", VisionConfig().task) == "chat")
    with contextlib.suppress(NaloraError):  # language model, or loading will report the error
        return open_files(resolve_source(located.base), images=True).config.sight is not None
    return False


class _Adapters:
    """A model and its current adapter."""

    def __init__(self, model: AdaptedModel, mesh: Any, rank: int) -> None:
        self._model, self._mesh, self._least = model, mesh, rank
        self._slot: AdapterSlot | None = None
        self.generator = self._with(model.lora, model.spec)
        self.name = shown_model(model.located.base, model.located.adapter)
        _warn_without_turns(model.located.adapter)

    def switch(self, path: str) -> None:
        """Responds with the adapter in ``path`` from now on; "none" removes the adapter.

        Raises:
          NaloraError: it is not an adapter of this base.
        """
        from nalora_jax.models.targets import AdapterSpec
        from nalora_jax.train.adapted import adapter_for
        from nalora_jax.train.located import adapter_folder

        base = self._model.base
        if path == "none":
            self.generator, self.name = (
                self._with(None, AdapterSpec()),
                shown_model(self._model.located.base, None),
            )
            return
        folder = adapter_folder(Path(path))
        lora, spec = adapter_for(base, folder)
        self.generator, self.name = self._with(lora, spec), shown_model(self._model.located.base, folder)
        _warn_without_turns(folder)

    def _with(self, lora: Any, spec: Any) -> Generator:
        """Returns the generator with an adapter, in the compiled slot if it takes the adapter."""
        import jax

        from nalora_jax.evaluate.generate import Generator
        from nalora_jax.layout import distributed
        from nalora_jax.weights.adapter_forms import AdapterSlot

        model, rank = self._model, AdapterSlot.rank_of(spec)
        if not AdapterSlot.takes(spec):
            module = model.module.clone(adapters=spec)
        else:
            if self._slot is None or rank > AdapterSlot.rank_of(self._slot.spec):
                self._slot = AdapterSlot.on(model.base.config, rank=max(rank, self._least))
            module, lora = (
                model.module.clone(adapters=self._slot.spec),
                self._slot.fill(lora, spec),
            )
        if self._mesh is not None:
            lora = jax.device_put(lora, distributed.shardings(lora, self._mesh, distributed.STATE_RULES))
        variables = {"params": model.base.params, "lora": lora}
        processor = model.base.processor
        return Generator(module, variables, model.base.tokenizer, mesh=self._mesh, processor=processor)


@dataclass
class _Talk:
    """A conversation, and the effects of typed lines on it."""

    args: ChatArgs
    model: AdaptedModel
    adapters: _Adapters
    conversation: Conversation
    answers: int = 0
    pictures: list[Any] = field(default_factory=list)  # prepared for the next message

    def take(self, line: str) -> bool:
        """Executes a line and returns True to continue, also after an error, which is printed."""
        try:
            if not line.startswith("/"):
                self._answer(line)
                return True
            name, _, argument = line.partition(" ")
            return self._command(name, argument.strip())
        except NaloraError as error:
            _say(f"error: {' '.join(str(error).split())}")
            return True

    def _command(self, name: str, argument: str) -> bool:
        if name in ("/exit", "/quit"):
            return False
        does: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _say(HELP),
            "/adapter": self._adapter,
            "/image": self._image,
            "/system": self._system,
            "/reset": self._reset,
        }
        if name not in does:
            raise NaloraError(
                name, expected=", ".join([*does, "/exit"]), found="none of them", remedy="see /help"
            )
        does[name](argument)
        return True

    def _adapter(self, path: str) -> None:
        if path:
            self.adapters.switch(path)
        _say(self.adapters.name)

    def _image(self, path: str) -> None:
        from nalora_jax.common.files import expand_user
        from nalora_jax.data.images.files import open_image

        processor = self.model.base.processor
        if processor is None:
            loaded_as = f"{self.adapters.name}, which was loaded as a language model"
            raise NaloraError("/image", expected="a model that sees images", found=loaded_as)
        if not path:
            raise NaloraError("/image", expected="an image file", found="none")
        self.pictures.append(processor(open_image(expand_user(path)))["pixels"])
        _say(f"with the next message: {len(self.pictures)} image{'s' * (len(self.pictures) > 1)}")

    def _system(self, text: str) -> None:
        self.conversation.system = text or None
        _say(f"system prompt: {text}" if text else "no system prompt")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self.pictures = []
        _say("a new conversation")

    def _answer(self, text: str) -> None:
        seed = (self.args.seed + self.answers) % 2**32
        settings = asdict(self.args.sampling)
        pieces = self.conversation.ask(
            text, self.adapters.generator, images=self.pictures, seed=seed, **settings
        )
        self.answers += 1
        self.pictures = []
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:  # stops this response, not the conversation
            _say(" ...")
        print(flush=True)


def _warn_without_turns(adapter: Path | None) -> None:
    """Warns if an adapter was trained without the chat template that a conversation uses."""
    from nalora_jax.train.located import trained_in_turns

    if adapter is not None and trained_in_turns(adapter) is False:
        _say(
            f"warning: {adapter} was trained on prompts without a chat template; nalora generate "
            "--prompt uses none"
        )


def _lines() -> Iterator[str]:
    """Yields typed lines, editable at a terminal; Ctrl-C ends them like end of input."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # arrows and history, if Python has it
    while True:
        try:
            yield input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError as error:
            raise NaloraError("standard input", expected="text in UTF-8", found=error) from error


def _say(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)
