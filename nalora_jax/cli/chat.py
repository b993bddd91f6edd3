"""``nalora chat``: a conversation at the terminal, or with lines from a pipe."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
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
    talk = _Talk(args, model, mesh)
    _say(f"{talk.name} · /help lists commands")
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


class _Talk:
    """A conversation with a model and its current adapter, and the effects of typed lines on both."""

    def __init__(self, args: ChatArgs, model: AdaptedModel, mesh: Any) -> None:
        from nalora_jax.evaluate.generate.conversation import Conversation

        self.args, self.model, self.mesh = args, model, mesh
        self.conversation, self.answers = Conversation(args.system), 0
        self.pictures: list[Any] = []  # prepared for the next message
        self.slot: AdapterSlot | None = None
        self._use(model.lora, model.spec, model.located.adapter)

    def _use(self, lora: Any, spec: Any, adapter: Path | None) -> None:
        """Responds with an adapter from now on, in the compiled slot if it takes the adapter."""
        import jax

        from nalora_jax.evaluate.generate import Generator
        from nalora_jax.layout import distributed
        from nalora_jax.train.located import trained_in_turns
        from nalora_jax.weights.adapter_forms import AdapterSlot

        base, rank = self.model.base, AdapterSlot.rank_of(spec)
        if AdapterSlot.takes(spec):
            if self.slot is None or rank > AdapterSlot.rank_of(self.slot.spec):
                self.slot = AdapterSlot.on(base.config, rank=max(rank, self.args.max_lora_rank))
            lora, spec = self.slot.fill(lora, spec), self.slot.spec
        if self.mesh is not None:
            lora = jax.device_put(lora, distributed.shardings(lora, self.mesh, distributed.STATE_RULES))
        self.generator = Generator(
            self.model.module.clone(adapters=spec),
            {"params": base.params, "lora": lora},
            base.tokenizer,
            mesh=self.mesh,
            processor=base.processor,
        )
        self.name = shown_model(self.model.located.base, adapter)
        if adapter is not None and trained_in_turns(adapter) is False:
            _say(
                f"warning: {adapter} was trained on prompts without a chat template; nalora generate "
                "--prompt uses none"
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
        if name == "/help":
            _say(HELP)
        elif name == "/adapter":
            if argument:
                self._switch(argument)
            _say(self.name)
        elif name == "/image":
            self._add_image(argument)
        elif name == "/system":
            self.conversation.system = argument or None
            _say(f"system prompt: {argument}" if argument else "no system prompt")
        elif name == "/reset":
            self.conversation.reset()
            self.pictures = []
            _say("a new conversation")
        else:
            expected = "/help, /adapter, /image, /system, /reset, /exit"
            raise NaloraError(name, expected=expected, found="none of them", remedy="see /help")

    def _switch(self, path: str) -> None:
        """Responds with the adapter in ``path`` from now on; "none" removes the adapter.

        Raises:
          NaloraError: it is not an adapter of this base.
        """
        from nalora_jax.models.targets import AdapterSpec
        from nalora_jax.train.adapted import adapter_for
        from nalora_jax.train.located import adapter_folder

        if path == "none":
            self._use(None, AdapterSpec(), None)
        else:
            folder = adapter_folder(Path(path))
            self._use(*adapter_for(self.model.base, folder), folder)

    def _add_image(self, path: str) -> None:
        from nalora_jax.common.files import expand_user
        from nalora_jax.data.images.files import open_image

        processor = self.model.base.processor
        if processor is None:
            loaded_as = f"{self.name}, which was loaded as a language model"
            raise NaloraError("/image", expected="a model that sees images", found=loaded_as)
        if not path:
            raise NaloraError("/image", expected="an image file", found="none")
        self.pictures.append(processor(open_image(expand_user(path)))["pixels"])
        _say(f"with the next message: {len(self.pictures)} image{'s' * (len(self.pictures) > 1)}")

    def _answer(self, text: str) -> None:
        seed = (self.args.seed + self.answers) % 2**32
        settings = asdict(self.args.sampling)
        pieces = self.conversation.ask(text, self.generator, images=self.pictures, seed=seed, **settings)
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
            raise NaloraError("standard input", expected="text in UTF-8", found=error) from error


def _say(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)
