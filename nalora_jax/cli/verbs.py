"""The subcommands: each takes arguments (`nalora_jax.cli.parser`), prints and writes files."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from etils import epy

from nalora_jax.cli import config_files, outputs
from nalora_jax.cli import parser as cli
from nalora_jax.common import buckets, files, folders, uploads
from nalora_jax.config import check, config_from_dict
from nalora_jax.errors import NaloraError

with epy.lazy_imports():  # on first use: `nalora report` does not wait for JAX
    from nalora_jax.cli import dry_run, training
    from nalora_jax.data import chat_text, labels, sources
    from nalora_jax.data import tokenizer as tokenizers
    from nalora_jax.data.images import image_chat as image_chat
    from nalora_jax.data.images import image_files as image_files
    from nalora_jax.evaluate import generate as generation
    from nalora_jax.evaluate.generate import conversation
    from nalora_jax.kinds import dual, text
    from nalora_jax.loading import adapted, adapted_dual, located
    from nalora_jax.report import compare, gate_comparison, history, html
    from nalora_jax.report import inspect as inspection
    from nalora_jax.study import execution, protocol, verification
    from nalora_jax.study import study_report as study_report
    from nalora_jax.study.sweeps import grid
    from nalora_jax.study.sweeps import sweep_run as sweeps
    from nalora_jax.weights import card as model_card
    from nalora_jax.weights import embedding_files as embedding_files
    from nalora_jax.weights import (
        gguf_export,
        hub,
        model_files,
        new_tokens,
        peft_modules,
        peft_settings,
        peft_tables,
        shards,
        tokenizer_files,
    )
    from nalora_jax.weights import merge as merging
    from nalora_jax.weights import merge_stored as merging_stored


def train(args: cli.TrainArgs) -> None:
    """Fine-tunes a model by its config; `nalora_jax.cli.training.run` prints the progress."""
    check(args.run)  # before heavy imports
    outputs.check_new_path("--output", Path(args.run.output))
    if args.dry_run:
        if args.sweep:
            runs = grid.grid(args.run, grid.axes_of(args.sweep))
        else:
            runs = [args.run]
        dry_run.dry_run(runs, every_setting=args.all)
    elif args.sweep:
        sweeps.sweep_grid(args.run, args.sweep)
    else:
        training.run(args.run)


def generate(args: cli.GenerateArgs) -> None:
    """Prints the response while it is generated."""
    if (args.prompt is None) == (args.messages is None):
        given = "both"
        if args.prompt is None:
            given = "neither"
        raise NaloraError(
            "nalora generate", expected="--prompt or --messages", found=given
        )
    messages = None
    if args.messages is not None:
        messages = conversation.read_messages(args.messages)
    prompt = args.prompt or ""
    if prompt == "-":
        prompt = _standard_input()
    asked = [{"role": "user", "content": prompt}]
    mesh = outputs.mesh_of(args.mesh)
    # fails before a model is loaded
    pictures = [image_files.open_image(path) for path in args.image]
    if args.chat and not pictures:
        _require_template(args.model, args.adapter, messages or asked)
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "mesh": mesh,
        "images": bool(pictures) or None,
    }
    model = adapted.load(args.model, adapter=args.adapter, **options)
    tokenizer = model.base.tokenizer
    processor = model.base.processor
    adapter = model.located.adapter
    tokens: str | list[int] = prompt
    pixels = []
    if pictures:
        in_turns = tokenizer.chat_template is not None and args.chat is not False
        sizes = [(picture.height, picture.width) for picture in pictures]
        tokens = image_chat.question_tokens(prompt, sizes, tokenizer, chat=in_turns)
        assert processor is not None
        pixels = [processor.prepare(picture) for picture in pictures]
    else:
        in_turns = bool(args.chat)
        if args.chat is None and adapter is not None:
            in_turns = bool(located.was_trained_in_turns(adapter))
        if in_turns:
            messages = messages or asked
        if messages is not None:
            tokens = conversation.chat_tokens(tokenizer, messages)
    generator = generation.Generator(
        model.module, model.variables, tokenizer, mesh=mesh, processor=processor
    )
    for piece in generator.stream(
        tokens, images=pixels, seed=args.seed, **asdict(args.sampling)
    ):
        print(piece, end="", flush=True)
    print()


@outputs.remove_if_stopped()
def export(args: cli.ExportArgs) -> None:
    """Writes an adapter for another tool, and verifies it by reloading."""
    if args.target != "gguf":
        outputs.refuse_existing(args.output)
    else:
        where = buckets.bucket_url(args.output)
        if where is not None:
            uploads.require_free(where)
        else:
            outputs.check_new_file("--output", args.output)
            folders.refuse_claimed(args.output)
        if args.output.suffix != ".gguf":
            raise NaloraError(
                "--output", expected="a name that ends in .gguf", found=str(args.output)
            )
    if args.model:
        name, adapter = (args.model, args.run)
    else:
        name, adapter = (str(args.run), None)
    output = outputs.name_output(args.output)
    if outputs.is_dual(name, adapter):
        if args.target != "peft":
            raise NaloraError(
                "--for", expected="peft for image and text encoders", found=args.target
            )
        encoders = adapted_dual.load_adapted_dual(name, adapter=adapter)
        assert encoders.lora is not None
        with folders.new_folder(args.output) as folder:
            dual.write_dual_adapter(folder, encoders.base, encoders.lora, encoders.spec)
            files.write_atomically(folder / "README.md", card(encoders, "adapter"))
        print(
            f"{output}: adapter for peft, read back and compared (every number is equal)"
        )
        return
    _require_adapter(located.locate(name, adapter))
    model = adapted.load(name, adapter=adapter)
    base = model.base
    lora = model.lora
    assert lora is not None
    tool: str = args.target
    if args.target == "gguf":
        tool = "llama.cpp"
        with folders.new_file(args.output) as path:
            gguf_export.write_adapter_gguf(path, base.config, lora, model.spec)
            difference = gguf_export.verify_adapter_gguf(
                path, base.config, lora, model.spec
            )
    else:
        layout = peft_modules.layout_for(args.target, base.config, base.hf_config)
        options: dict[str, Any] = {
            "target": args.target,
            "max_lora_rank": args.max_lora_rank,
            "layout": layout,
        }
        if model.spec.score and model.located.adapter is not None:
            options["write_extra"] = labels.LabelSet.read(model.located.adapter).write
        if args.target == "peft" and model.located.adapter is not None:
            copier = embedding_files.copier_of(model.located.adapter)
            if copier is not None:
                layout = peft_modules.layout_for("embedding", base.config)
                options |= {"target": "embedding", "layout": layout}
                options["write_extra"] = copier
        with folders.new_folder(args.output) as folder:
            difference = text.write_adapter(folder, base, lora, model.spec, **options)
            files.write_atomically(folder / "README.md", card(model, "adapter"))
    compared = f"read back and compared (largest difference {difference:.1e})"
    print(f"{output}: adapter for {tool}, {compared}")
    if args.target == "gguf" and base.rope_scaling:
        scaling = (
            f"RoPE scaling {base.rope_scaling}: set it in llama.cpp (--rope-scaling)"
        )
        print(f"{output}: trained with {scaling}")


@outputs.remove_if_stopped()
def merge(args: cli.MergeArgs) -> None:
    """Writes base and adapter as one Hugging Face folder."""
    shard_bytes = shards.parse_size(args.shard_size)
    outputs.refuse_existing(args.output)
    if args.dtype == "stored":
        _merge_stored(args, shard_bytes)
        return
    model: Any
    hf_config: Mapping[str, Any] = {}
    tokenizer: Any = None
    # Merged in float32 and rounded once: values in the files must not be rounded again on loading.
    if outputs.is_dual(args.model, args.adapter):
        model = adapted_dual.load_adapted_dual(
            args.model, adapter=args.adapter, dtype="float32"
        )
        config = model.base.config
        params = model.base.params
        spec = model.spec
        if not config.trained:
            folder = hub.resolve_encoder(model.located.base).path
            hf_config = tokenizers.read_json(folder / "config.json")
            tokenizer = partial(tokenizer_files.copy_tokenizer, folder, images=True)
    else:
        place = located.locate(args.model, args.adapter)
        _require_adapter(place)
        resolved = hub.resolve_source(place.base)
        dtype = "float32"
        if resolved.kind == "hf":
            stored = tokenizers.read_json(resolved.path / "config.json")
            if (stored.get("dtype") or stored.get("torch_dtype")) == "bfloat16":
                dtype = "bfloat16"
        model = adapted.load(
            args.model, adapter=args.adapter, dtype=dtype, resolved=resolved
        )
        base = model.base
        config, params, spec = peft_tables.fold_saved(
            base.config, base.params, model.lora, model.spec
        )
        hf_config = base.hf_config
        tokenizer = new_tokens.tokenizer_writer(base, files=resolved.path)
        if base.config.tie_embeddings and not config.tie_embeddings:
            hf_config = {**hf_config, "tie_word_embeddings": False}
    options: dict[str, Any] = {"dtype": args.dtype, "shard_bytes": shard_bytes}
    options |= {
        "hf_config": hf_config,
        "tokenizer": tokenizer,
        "card": card(model, "merged"),
    }
    merging.write_merged(args.output, config, params, model.lora, spec, **options)
    print(f"{outputs.name_output(args.output)}: merged model in {args.dtype}")


def _merge_stored(args: cli.MergeArgs, shard_bytes: int) -> None:
    """Writes base and adapter in the number format of a quantized base, and prints the error.

    Raises:
      NaloraError: the base is not a folder in fp8 or int8.
    """
    base = args.model
    resolved = None
    if not outputs.is_dual(args.model, args.adapter):
        place = located.locate(args.model, args.adapter)
        _require_adapter(place)
        base = place.base
        resolved = hub.resolve_source(base)
    source = None
    if resolved is not None:
        source = model_files.quantized_tensors(resolved)
    if resolved is None or source is None:
        raise NaloraError(
            "--dtype stored",
            expected="a base that is published in fp8 or int8, as a Hugging Face folder",
            found=base,
            remedy="merge with --dtype bfloat16",
        )
    merging_stored.check_stored_format(source)  # before weights are read
    model = adapted.load(
        args.model, adapter=args.adapter, dtype="float32", resolved=resolved
    )
    assert model.lora is not None
    error = merging_stored.write_stored(
        args.output,
        source,
        model.base.config,
        model.base.params,
        model.lora,
        model.spec,
        hf_config=model.base.hf_config,
        tokenizer=new_tokens.tokenizer_writer(model.base, files=resolved.path),
        card=card(model, "merged"),
        shard_bytes=shard_bytes,
    )
    stated = error.describe(source.quantization.describe())
    print(f"{outputs.name_output(args.output)}: merged model; {stated}")


def inspect(args: cli.InspectArgs) -> None:
    """Prints the table of every layer's gates, and draws the plot if requested."""
    if args.picture is not None:
        inspection.check_picture(args.picture)  # before minutes of computation
        outputs.check_new_path("--picture", args.picture)
    if args.texts and not any(text.strip() for text in args.texts):
        raise NaloraError(
            "--texts",
            expected="at least one text with a token in it",
            found=f"{len(args.texts)} texts",
        )
    source = None
    if args.dataset is not None:
        changes = {
            "dataset": args.dataset,
            "eval_split": args.split,
            "eval_limit": args.limit,
        }
        data = outputs.data_settings(
            located.locate(args.model, args.adapter).run, changes
        )
        with outputs.name_flags_of("--dataset"):
            source = sources.open_held_out(data, data.eval_split)
            source.read([0])
    model = adapted.load(args.model, adapter=args.adapter, dtype=args.dtype)
    texts: Sequence[str] = args.texts or inspection.TEXTS
    if source is not None:  # its first records, as in training
        records = source.read(range(min(len(source), data.eval_limit or len(source))))
        texts = [
            chat_text.render_record(
                record, data, model.base.tokenizer, source.where(index)
            ).text
            for index, record in enumerate(records)
        ]
    if args.against is not None:
        _inspect_against(args, model, texts)
        return
    summary = inspection.inspect_texts(
        model, texts, max_length=args.max_length, seed=args.seed
    )
    name = outputs.name_model(model.located.base, model.located.adapter)
    title = f"{name}: {model.base.config.activation} gates on {len(texts)} texts"
    print(inspection.layer_table(summary, title))
    if args.picture is not None:
        print(inspection.save_picture(summary, args.picture, title))


def _inspect_against(
    args: cli.InspectArgs, model: adapted.AdaptedModel, texts: Sequence[str]
) -> None:
    """Prints the comparison of a model's gates with those of another run."""
    assert args.against is not None
    reference = adapted.load(args.against, dtype=args.dtype)
    comparisons = gate_comparison.compare_gates(
        model, reference, texts, max_length=args.max_length
    )
    title = f"gates of {args.model} against {args.against} on {len(texts)} texts"
    print(gate_comparison.comparison_table(comparisons, title))
    if args.json is not None:
        figures = {path: each.to_dict() for path, each in comparisons.items()}
        files.write_atomically(args.json, json.dumps(figures).encode())


def report(args: cli.ReportArgs) -> None:
    """Writes report.html again, or a page about several runs, and prints its path."""
    if not args.run:
        raise NaloraError("nalora report", expected="the folder of a run", found="none")
    if len(args.run) > 1:
        page = compare.write_comparison(args.run, args.output)
    else:
        page = html.write_report(args.run[0])
    print(page)


def study(args: cli.StudyArgs) -> None:
    """Executes, shows, reports or verifies a study."""
    read = protocol.read_protocol(args.study)
    if args.action == "run":
        execution.run_study(
            read, limit=args.limit, methods=args.methods, together=args.together
        )
    elif args.action == "verify":
        print(verification.verify_records(read, count=args.limit or 3))
    elif args.action == "status":
        print(study_report.status(read))
    else:
        print(*study_report.write_tables(read), sep="\n")


def from_peft(args: cli.FromPeftArgs) -> None:
    """Converts a file; comments in the output name every setting that is not carried over.

    Raises:
      NaloraError: the file has no settings of PEFT, or unsupported settings, all of which are
        listed.
    """
    path = args.file
    where = buckets.bucket_url(path)
    if where is not None:
        if path.suffix not in (".json", ".yaml", ".yml"):
            where = f"{where}/adapter_config.json"
        path = buckets.local_copy(where)
    elif path.is_dir():
        path /= "adapter_config.json"
    values = config_files.read_values(path)
    fields: Mapping[Any, Any] = {}
    if isinstance(values, Mapping):
        fields = values
    if not set(fields) & set(peft_settings.PEFT):
        found = ", ".join(map(str, fields)) or "none"
        raise NaloraError(
            str(path),
            expected="settings of PEFT",
            found=found,
            remedy="settings of TRL have a table in docs/from_peft.md",
        )
    settings, notes = peft_settings.convert_peft_config(values)
    config = check(config_files.settings_of(settings, path))
    content = "".join(f"# {note}\n" for note in notes) + config_files.format_yaml(
        config, changed_only=True
    )
    if args.output is None:
        sys.stdout.write(content)
        return
    if args.output.exists():
        raise NaloraError(
            "--output", expected="a new file", found=f"{args.output}, which exists"
        )
    files.write_atomically(args.output, content)
    print(f"{args.output}: nalora train --config {args.output}")


def card(
    model: adapted.AdaptedModel | adapted_dual.AdaptedDual,
    kind: Literal["adapter", "merged"],
) -> str:
    """Returns a model card's README.md, with settings and results if ``model`` is from a run."""
    written = model_card.base_card(kind, model.located.base, model.base, model.spec)
    if model.located.run and model.located.adapter is not None:
        log = history.read_history(model.located.adapter.parent)
        measured = [record["eval"] for record in log.measured]
        after = None
        if len(measured) > 1:
            after = measured[-1]
        written = replace(
            written,
            run=config_from_dict(model.located.run),
            before=next(iter(measured), None),
            after=after,
            versions=log.header.get("versions", {}),
            device=log.header.get("device", ""),
            acting=log.acting_steps,
        )
    if kind == "adapter" and model.located.adapter is not None:
        copier = embedding_files.copier_of(model.located.adapter)
        written = replace(written, vectors=copier is not None)
    return model_card.render_card(written)


def _require_template(
    model: str, adapter: Path | None, messages: Sequence[dict[str, Any]]
) -> None:
    """Refuses messages that the base's chat template does not support, before weights are read.

    A base without a template is refused too.
    """
    place = located.locate(model, adapter)
    if place.adapter is None:  # an adapter with added tokens has its tokenizer
        base = hub.resolve_source(place.base)
        conversation.chat_tokens(
            model_files.open_files(base).tokenizer_with(), messages
        )


def _require_adapter(place: located.Located) -> None:
    """Refuses a base without adapter before its weights are read."""
    if place.adapter is None:
        raise NaloraError(
            place.base,
            expected="an adapter",
            found="a base model",
            remedy="give a run's folder",
        )


def _standard_input() -> str:
    """Returns all text of standard input.

    Raises:
      NaloraError: it is not UTF-8.
    """
    try:
        # strict, independent of the locale
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise NaloraError(
            "--prompt -", expected="text in UTF-8 on standard input", found=error
        ) from error
