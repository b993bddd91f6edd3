"""``nalora chat``: a conversation at the terminal, or with lines from a pipe."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from etils import epy
from tyro.conf import arg

from nalora_jax.cli.outputs import mesh_of, name_model
from nalora_jax.cli.parser import ModelArgs
from nalora_jax.common.files import expand_user
from nalora_jax.config import VisionConfig
from nalora_jax.config.settings import GenerationConfig
from nalora_jax.config.structured import MAX_RANK, SEED
from nalora_jax.errors import NaloraError, visible

with epy.lazy_imports():  # on first use: help needs no JAX
    import jax

    from nalora_jax.data.images import image_files as image_files
    from nalora_jax.evaluate import generate
    from nalora_jax.evaluate.generate import conversation, slots
    from nalora_jax.loading import adapted, located
    from nalora_jax.mesh import sharding
    from nalora_jax.models import targets
    from nalora_jax.weights import hub, model_files

HELP = """\
/image PATH      show an image with the next message (vision-language models); repeat it for more
/adapter PATH    answer with another adapter (a run's or a PEFT folder); "none" is the base alone
/system TEXT     another system prompt; without a text, none
/reset           forget what was said; the system prompt stays
/help            show these commands
/exit            end the conversation (so does the end of input)"""


# The defaults of a conversation.
_SAMPLING = GenerationConfig(max_new_tokens=512, temperature=0.7, top_p=0.95)


@dataclass(frozen=True)
class ChatArgs(ModelArgs):
    """Chat with a model, or with a model and an adapter; /help lists the other inputs."""

    # System prompt.
    system: str | None = None
    sampling: Annotated[GenerationConfig, arg(name="")] = _SAMPLING
    # Seed of the sampling; the n-th response uses this seed plus n.
    seed: Annotated[int, SEED] = 0
    # Adapters up to this rank can be switched without compilation.
    max_lora_rank: Annotated[int, MAX_RANK] = 16
    # Quantize the adapted model's projections. By default as in the run, else not.
    quantize: Literal["none", "int8", "nf4", "mxfp4"] | None = None


def chat(args: ChatArgs) -> None:
    """Reads lines until end of input; streams responses to stdout and messages to stderr."""
    mesh = mesh_of(args.mesh)
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "quantize": args.quantize or "run",
        "mesh": mesh,
    }
    model = adapted.load(
        args.model, adapter=args.adapter, images=_has_vision(args), **options
    )
    if model.base.tokenizer.chat_template is None:
        raise NaloraError(
            args.model,
            expected="a model with a chat template",
            found="none in its tokenizer",
            remedy="use an instruction-tuned model, or nalora generate",
        )
    talk = _Talk(args, model, mesh)
    _say(f"{talk.name} · /help lists commands")
    for line in _lines():
        if line and not talk.take(line):
            break


def _has_vision(args: ChatArgs) -> bool:
    """Returns True if the model has an image encoder, unless the adapter's run did not use it."""
    place = located.locate(args.model, args.adapter)
    if place.run:
        task = place.run.get("vision", {}).get("task", VisionConfig().task)
        return bool(task == "chat")
    # language model, or loading will report the error
    with contextlib.suppress(NaloraError):
        files = model_files.open_files(hub.resolve_source(place.base), images=True)
        return files.config.vision is not None
    return False


class _Talk:
    """A conversation with a model and its current adapter, which typed lines change.

    Args:
      args: of the subcommand.
      model: the model, with the first adapter.
      mesh: mesh of the weights; None: one device.
    """

    def __init__(self, args: ChatArgs, model: adapted.AdaptedModel, mesh: Any) -> None:
        """Starts an empty conversation."""
        self.args = args
        self.model = model
        self.mesh = mesh
        self.conversation = conversation.Conversation(args.system)
        self.answers = 0
        self.pictures: list[Any] = []  # prepared for the next message
        self.slot: slots.AdapterSlot | None = None
        self._use(model.lora, model.spec, model.located.adapter)

    def _use(self, lora: Any, spec: Any, adapter: Path | None) -> None:
        """Responds with an adapter from now on, in the compiled slot if it takes the adapter."""
        base = self.model.base
        kind = slots.AdapterSlot
        if kind.takes(spec):
            rank = kind.rank_of(spec)
            if self.slot is None or rank > kind.rank_of(self.slot.spec):
                self.slot = kind.on(
                    base.config, rank=max(rank, self.args.max_lora_rank)
                )
            lora = self.slot.fill(lora, spec)
            spec = self.slot.spec
        if self.mesh is not None:
            lora = jax.device_put(
                lora, sharding.shardings(lora, self.mesh, sharding.STATE_RULES)
            )
        module = self.model.module.clone(adapters=spec)
        variables = {"params": base.params, "lora": lora}
        self.generator = generate.Generator(
            module, variables, base.tokenizer, mesh=self.mesh, processor=base.processor
        )
        self.name = name_model(self.model.located.base, adapter)
        if adapter is not None and located.was_trained_in_turns(adapter) is False:
            _say(
                f"warning: {adapter} was trained on prompts without a chat template; "
                "nalora generate --prompt uses none"
            )

    def take(self, line: str) -> bool:
        """Executes a line and returns True to continue, also after an error, which is printed."""
        name, _, argument = line.partition(" ")
        try:
            if not line.startswith("/"):
                self._answer(line)
            elif name in ("/exit", "/quit"):
                return False
            else:
                self._command(name, argument.strip())
        except NaloraError as error:
            _say(f"error: {' '.join(str(error).split())}")
        return True

    def _command(self, name: str, argument: str) -> None:
        """Executes a command such as ``/adapter PATH``.

        Raises:
          NaloraError: the command is unknown, or its file cannot be used.
        """
        match name:
            case "/help":
                _say(HELP)
            case "/adapter":
                if argument == "none":
                    self._use(None, targets.AdapterSpec(), None)
                elif argument:
                    folder = located.adapter_folder(Path(argument))
                    self._use(*adapted.adapter_for(self.model.base, folder), folder)
                _say(self.name)
            case "/image":
                self._add_image(argument)
            case "/system":
                self.conversation.system = argument or None
                if argument:
                    _say(f"system prompt: {argument}")
                else:
                    _say("no system prompt")
            case "/reset":
                self.conversation.reset()
                self.pictures = []
                _say("a new conversation")
            case _:
                raise NaloraError(
                    name,
                    expected="/help, /adapter, /image, /system, /reset, /exit",
                    found="none of them",
                    remedy="see /help",
                )

    def _add_image(self, path: str) -> None:
        """Prepares an image for the next message.

        Raises:
          NaloraError: the model does not see images, or the file is no image.
        """
        processor = self.model.base.processor
        if processor is None:
            raise NaloraError(
                "/image",
                expected="a vision-language model",
                found=f"{self.name}, which was loaded as a language model",
            )
        if not path:
            raise NaloraError("/image", expected="an image file", found="none")
        self.pictures.append(
            processor.prepare(image_files.open_image(expand_user(path)))
        )
        count = len(self.pictures)
        if count == 1:
            _say("with the next message: 1 image")
        else:
            _say(f"with the next message: {count} images")

    def _answer(self, text: str) -> None:
        """Prints the response to a message while it is generated."""
        seed = (self.args.seed + self.answers) % 2**32
        settings = asdict(self.args.sampling)
        pieces = self.conversation.ask(
            text, self.generator, images=self.pictures, seed=seed, **settings
        )
        self.answers += 1
        self.pictures = []
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:  # stops this response, not the conversation
            _say(" ...")
        print(flush=True)


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
            raise NaloraError(
                "standard input", expected="text in UTF-8", found=error
            ) from error


def _say(text: str) -> None:
    """Prints a message to standard error, without control characters."""
    print(visible(text), file=sys.stderr, flush=True)
