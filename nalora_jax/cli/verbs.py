"""The subcommands: each takes arguments (`nalora_jax.cli.parser`), prints and writes files.

Each subcommand imports the heavy modules that it needs, so that ``nalora report`` does not wait for
JAX.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nalora_jax.cli import outputs
from nalora_jax.cli import parser as cli
from nalora_jax.common import buckets, uploads
from nalora_jax.common.folders import refuse_claimed
from nalora_jax.config import DataConfig, check, config_from_dict
from nalora_jax.errors import NaloraError

if TYPE_CHECKING:
    from nalora_jax.data.tokenizer import Tokenizer
    from nalora_jax.train.adapted import AdaptedModel
    from nalora_jax.train.adapted_dual import AdaptedDual
    from nalora_jax.train.located import Located


def train(args: cli.TrainArgs) -> None:
    """Fine-tunes a model by its config; `nalora_jax.cli.training.run` prints the progress."""
    check(args.run)  # before heavy imports
    outputs.check_new_path("--output", Path(args.run.output))
    if args.dry_run:
        from nalora_jax.cli.dry_run import dry_run
        from nalora_jax.study.sweeps.grid import axes_of, grid

        runs = grid(args.run, axes_of(args.sweep)) if args.sweep else [args.run]
        return dry_run(runs, every_setting=args.all)
    if args.sweep:
        from nalora_jax.study.sweeps.run import sweep_grid

        sweep_grid(args.run, args.sweep)
        return None
    from nalora_jax.cli.training import run

    run(args.run)


def generate(args: cli.GenerateArgs) -> None:
    """Prints the response while it is generated."""
    from nalora_jax.data.images.chat import asked
    from nalora_jax.data.images.files import open_image
    from nalora_jax.evaluate.generate import Generator
    from nalora_jax.evaluate.generate.conversation import chat_tokens, read_messages
    from nalora_jax.train.adapted import load
    from nalora_jax.train.located import trained_in_turns

    if (args.prompt is None) == (args.messages is None):
        prompts = "neither" if args.prompt is None else "both"
        raise NaloraError("nalora generate", expected="--prompt or --messages", found=prompts)
    messages, prompt = None, args.prompt or ""
    if args.messages is not None:
        messages = read_messages(args.messages)
    if prompt == "-":
        prompt = _standard_input()
    settings = asdict(args.sampling) | {"seed": args.seed}
    mesh = outputs.mesh_of(args.mesh)
    pictures = [open_image(path) for path in args.image]  # fails before a model is loaded
    if args.chat and not pictures:
        _require_template(args.model, args.adapter, messages or [{"role": "user", "content": prompt}])
    model = load(
        args.model, adapter=args.adapter, dtype=args.dtype, mesh=mesh, images=bool(pictures) or None
    )
    tokenizer, processor = model.base.tokenizer, model.base.processor
    tokens: str | list[int] = prompt
    if pictures:
        in_turns = tokenizer.chat_template is not None and args.chat is not False
        tokens = asked(prompt, len(pictures), tokenizer, chat=in_turns)
    else:
        adapter = model.located.adapter
        if args.chat or (args.chat is None and adapter is not None and trained_in_turns(adapter)):
            messages = messages or [{"role": "user", "content": prompt}]
        if messages is not None:
            tokens = chat_tokens(tokenizer, messages)
    generator = Generator(model.module, model.variables, tokenizer, mesh=mesh, processor=processor)
    pixels = []
    if processor is not None:
        pixels = [processor(picture)["pixels"] for picture in pictures]
    for piece in generator.stream(tokens, images=pixels, **settings):
        print(piece, end="", flush=True)
    print()


@outputs.removed_if_stopped()
def export(args: cli.ExportArgs) -> None:
    """Writes an adapter for another tool, and verifies it by reloading."""
    from nalora_jax.common.files import write_atomically
    from nalora_jax.common.folders import new_file, new_folder
    from nalora_jax.train.adapted import load
    from nalora_jax.train.kinds.text import write_adapter
    from nalora_jax.train.located import locate
    from nalora_jax.weights.peft_modules import layout_for

    if args.target == "gguf":
        if (where := buckets.bucket_url(args.output)) is not None:
            uploads.require_free(where)
        else:
            outputs.check_new_file("--output", args.output)
            refuse_claimed(args.output)
        if args.output.suffix != ".gguf":
            expected = "a name that ends in .gguf"
            raise NaloraError("--output", expected=expected, found=str(args.output))
    else:
        outputs.refuse_existing(args.output)
    name, adapter = args.names
    output = outputs.shown_output(args.output)
    model: AdaptedModel | AdaptedDual
    if outputs.is_dual(name, adapter):
        from nalora_jax.train.adapted_dual import load_adapted_dual
        from nalora_jax.train.kinds.dual import write_dual_adapter

        if args.target != "peft":
            raise NaloraError("--for", expected="peft for image and text encoders", found=args.target)
        model = load_adapted_dual(name, adapter=adapter)
        assert model.lora is not None
        with new_folder(args.output) as folder:
            write_dual_adapter(folder, model.base, model.lora, model.spec)
            write_atomically(folder / "README.md", card(model, "adapter"))
        print(f"{output}: adapter for peft, read back and compared (every number is equal)")
        return
    _require_adapter(locate(name, adapter))
    model = load(name, adapter=adapter)
    base, lora = model.base, model.lora
    assert lora is not None
    tool = str(args.target)
    if args.target == "gguf":
        from nalora_jax.weights.gguf_export import verify_adapter_gguf, write_adapter_gguf

        tool = "llama.cpp"
        with new_file(args.output) as path:
            write_adapter_gguf(path, base.config, lora, model.spec)
            difference = verify_adapter_gguf(path, base.config, lora, model.spec)
    else:
        layout = layout_for(args.target, base.config, base.hf_config)
        options = {"target": args.target, "max_lora_rank": args.max_lora_rank, "layout": layout}
        with new_folder(args.output) as folder:
            difference = write_adapter(folder, base, lora, model.spec, **options)
            write_atomically(folder / "README.md", card(model, "adapter"))
    print(f"{output}: adapter for {tool}, read back and compared (largest difference {difference:.1e})")
    if args.target == "gguf" and base.rope_scaling:
        scaling = f"RoPE scaling {base.rope_scaling}: set it in llama.cpp (--rope-scaling)"
        print(f"{output}: trained with {scaling}")


@outputs.removed_if_stopped()
def merge(args: cli.MergeArgs) -> None:
    """Writes base and adapter as one Hugging Face folder."""
    from nalora_jax.data.tokenizer import read_json
    from nalora_jax.train.adapted import load
    from nalora_jax.train.located import locate
    from nalora_jax.weights import hub
    from nalora_jax.weights.merge import write_merged
    from nalora_jax.weights.new_tokens import tokenizer_writer
    from nalora_jax.weights.peft_tables import fold_saved
    from nalora_jax.weights.shards import parse_size
    from nalora_jax.weights.tokenizer_files import copy_tokenizer

    shard_bytes = parse_size(args.shard_size)
    outputs.refuse_existing(args.output)
    model: AdaptedModel | AdaptedDual
    config: Any
    hf_config: Mapping[str, Any]
    tokenizer: Any
    # Merged in float32 and rounded once: values in the files must not be rounded again on loading.
    if outputs.is_dual(args.model, args.adapter):
        from nalora_jax.train.adapted_dual import load_adapted_dual

        model = load_adapted_dual(args.model, adapter=args.adapter, dtype="float32")
        assert model.lora is not None
        config, params, spec = model.base.config, model.base.params, model.spec
        hf_config, tokenizer = {}, None
        if not config.trained:
            folder = hub.resolve_encoder(model.located.base).path
            hf_config = read_json(folder / "config.json")
            tokenizer = partial(copy_tokenizer, folder, images=True)
    else:
        located = locate(args.model, args.adapter)
        _require_adapter(located)
        resolved = hub.resolve_source(located.base)
        dtype = "float32"
        if resolved.kind == "hf" and _stored_dtype(resolved.path / "config.json") == "bfloat16":
            dtype = "bfloat16"
        model = load(args.model, adapter=args.adapter, dtype=dtype, resolved=resolved)
        assert model.lora is not None
        config, params, spec = fold_saved(model.base.config, model.base.params, model.lora, model.spec)
        if model.base.hf_config is None:
            raise NaloraError(located.base, expected="a model with a config.json", found="none")
        hf_config, tokenizer = model.base.hf_config, tokenizer_writer(model.base, files=resolved.path)
        if model.base.config.tie_embeddings and not config.tie_embeddings:
            hf_config = {**hf_config, "tie_word_embeddings": False}
    write_merged(
        args.output,
        config,
        params,
        model.lora,
        spec,
        hf_config=hf_config,
        tokenizer=tokenizer,
        dtype=args.dtype,
        shard_bytes=shard_bytes,
        card=card(model, "merged"),
    )
    print(f"{outputs.shown_output(args.output)}: merged model in {args.dtype}")


def inspect(args: cli.InspectArgs) -> None:
    """Prints the table of every layer's gates, and draws the plot if requested."""
    from rich.console import Console

    from nalora_jax.data.sources import open_held_out
    from nalora_jax.report.inspect import TEXTS, check_picture, inspect_texts, layer_table, save_picture
    from nalora_jax.train.adapted import load
    from nalora_jax.train.located import locate

    if args.picture is not None:
        check_picture(args.picture)  # before minutes of computation
        outputs.check_new_path("--picture", args.picture)
    if args.texts and not any(text.strip() for text in args.texts):
        raise NaloraError(
            "--texts", expected="at least one text with a token in it", found=f"{len(args.texts)} texts"
        )
    data = None
    if args.dataset is not None:
        run = locate(args.model, args.adapter).run
        data = replace(
            outputs.data_settings(run, {}),
            dataset=args.dataset,
            eval_split=args.split,
            eval_limit=args.limit,
        )
        with outputs.flags_of_verb("--dataset"):
            open_held_out(data, data.eval_split).read([0])
    model = load(args.model, adapter=args.adapter, dtype=args.dtype)
    texts: Sequence[str] = args.texts or TEXTS
    if data is not None:
        texts = dataset_texts(data, model.base.tokenizer)
    summary = inspect_texts(model, texts, max_length=args.max_length, seed=args.seed)
    name = outputs.shown_model(model.located.base, model.located.adapter)
    title = f"{name}: {model.base.config.activation} gates on {len(texts)} texts"
    Console().print(layer_table(summary, title))
    if args.picture is not None:
        print(save_picture(summary, args.picture, title))


def report(args: cli.ReportArgs) -> None:
    """Writes report.html again, or a page about several runs, and prints its path."""
    from nalora_jax.report.compare import write_comparison
    from nalora_jax.report.html import write_report

    if not args.run:
        raise NaloraError("nalora report", expected="the folder of a run", found="none")
    print(write_report(args.run[0]) if len(args.run) == 1 else write_comparison(args.run, args.output))


def study(args: cli.StudyArgs) -> None:
    """Executes, shows, reports or verifies a study."""
    from nalora_jax.study.protocol import read_protocol

    protocol = read_protocol(args.study)
    if args.action == "run":
        from nalora_jax.study.execution import run_study

        run_study(protocol, limit=args.limit, methods=args.methods, together=args.together)
    elif args.action == "verify":
        from nalora_jax.study.verification import verify_records

        print(verify_records(protocol, count=args.limit or 3))
    elif args.action == "status":
        from nalora_jax.study.report import status

        print(status(protocol))
    else:
        from nalora_jax.study.report import write_tables

        for path in write_tables(protocol):
            print(path)


def from_peft(args: cli.FromPeftArgs) -> None:
    """Converts a file; comments in the output name every setting that is not carried over.

    Raises:
      NaloraError: the file has no settings of PEFT, or unsupported settings, all of which are listed.
    """
    from nalora_jax.cli import config_files
    from nalora_jax.common.files import write_atomically
    from nalora_jax.weights.peft_settings import PEFT
    from nalora_jax.weights.peft_settings import from_peft as convert

    path = args.file
    where = buckets.bucket_url(path)
    if where is not None:
        is_file = path.suffix in (".json", ".yaml", ".yml")
        path = buckets.local_copy(where if is_file else f"{where}/adapter_config.json")
    elif path.is_dir():
        path /= "adapter_config.json"
    values = config_files.read_values(path)
    fields = set(values) if isinstance(values, Mapping) else set()
    if not fields & set(PEFT):
        found = ", ".join(map(str, fields)) or "none"
        remedy = "settings of TRL have a table in docs/from_peft.md"
        raise NaloraError(str(path), expected="settings of PEFT", found=found, remedy=remedy)
    settings, notes = convert(values)
    config = check(config_files.settings_of(settings, path))
    text = "".join(f"# {note}\n" for note in notes) + config_files.as_yaml(config, changed_only=True)
    if args.output is None:
        sys.stdout.write(text)
        return
    if args.output.exists():
        raise NaloraError("--output", expected="a new file", found=f"{args.output}, which exists")
    write_atomically(args.output, text)
    print(f"{args.output}: nalora train --config {args.output}")


def card(model: AdaptedModel | AdaptedDual, kind: Literal["adapter", "merged"]) -> str:
    """Returns a model card's README.md, with settings and results if ``model`` is from a run."""
    from nalora_jax.report.history import read_history
    from nalora_jax.train.cards import base_card
    from nalora_jax.weights.card import render_card

    written = base_card(kind, model.located.base, model.base, model.spec)
    if model.located.run and model.located.adapter is not None:
        history = read_history(model.located.adapter.parent)
        measured = [record["eval"] for record in history.measured]
        written = replace(
            written,
            run=config_from_dict(model.located.run),
            before=next(iter(measured), None),
            after=measured[-1] if len(measured) > 1 else None,
            versions=history.header.get("versions", {}),
            device=history.header.get("device", ""),
        )
    return render_card(written)


def dataset_texts(data: DataConfig, tokenizer: Tokenizer) -> list[str]:
    """Returns the first ``eval_limit`` (0: all) records of ``eval_split``, as in training."""
    from nalora_jax.data.chat import render_record
    from nalora_jax.data.sources import open_held_out

    source = open_held_out(data, data.eval_split)
    count = min(len(source), data.eval_limit or len(source))
    records = enumerate(source.read(range(count)))
    return [render_record(record, data, tokenizer, source.where(index)).text for index, record in records]


def _require_template(model: str, adapter: Path | None, messages: Sequence[dict[str, Any]]) -> None:
    """Refuses messages that the base's chat template does not support, before weights are read.

    A base without a template is refused too.
    """
    from nalora_jax.evaluate.generate.conversation import chat_tokens
    from nalora_jax.train.located import locate
    from nalora_jax.weights import hub
    from nalora_jax.weights.model_files import open_files

    located = locate(model, adapter)
    if located.adapter is None:  # an adapter with added tokens has its tokenizer
        base = hub.resolve_source(located.base)
        chat_tokens(open_files(base).tokenizer_with(), messages)


def _require_adapter(located: Located) -> None:
    """Refuses a base without adapter before its weights are read."""
    if located.adapter is None:
        raise NaloraError(
            located.base, expected="an adapter", found="a base model", remedy="give a run's folder"
        )


def _stored_dtype(path: Path) -> str:
    """Returns the dtype that a config.json names."""
    from nalora_jax.data.tokenizer import read_json

    settings = read_json(path)
    return str(settings.get("dtype") or settings.get("torch_dtype"))


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")  # strict, independent of the locale
    except UnicodeDecodeError as error:
        raise NaloraError("--prompt -", expected="text in UTF-8 on standard input", found=error) from error
