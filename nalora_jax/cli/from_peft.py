"""``nalora from-peft``: converts PEFT settings to a file for ``nalora train --config``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from nalora_jax.config import check
from nalora_jax.errors import NaloraError


@dataclass(frozen=True)
class FromPeftArgs:
    """Write the settings of PEFT (adapter_config.json) as a config of nalora train."""

    # adapter_config.json, or an adapter's folder, or a LoraConfig as YAML or JSON.
    file: Positional[Path]
    # New YAML file to write; by default it is printed.
    output: Path | None = None


def from_peft(args: FromPeftArgs) -> None:
    """Converts a file; comments in the output name every setting that is not carried over.

    Raises:
      NaloraError: the file has no settings of PEFT, or unsupported settings, all of which are listed.
    """
    from nalora_jax import buckets
    from nalora_jax.cli import config_files
    from nalora_jax.files import write_atomically
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
