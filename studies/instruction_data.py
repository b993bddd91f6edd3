"""Registers ``alpaca_demo``, instructions from a package index, for machines that cannot reach the hub.

    nalora train --import studies/instruction_data.py --data.dataset alpaca_demo

It is the file ``alpaca_en_demo.json`` of LLaMA-Factory's source archive (Apache-2.0): 999 instructions of
Stanford Alpaca with answers of GPT-4, of which 985 differ in instruction or input. Repeated ones are left
out, because one could be in training and in test data. ``alpaca_demo:400`` has only records of at most 400
characters. The only split is "train", of which a study takes slices.

The archive is downloaded once with pip, which installs its build tools into a temporary folder, and
verified. Without pip or a network, put it into the folder that the error message names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from nalora_jax.common.digests import file_digest
from nalora_jax.common.downloads import cache_dir
from nalora_jax.data.source import Source
from nalora_jax.data.sources import FileSource, register_source
from nalora_jax.errors import NaloraError

PACKAGE, VERSION = "llamafactory", "0.9.5"
SHA256 = "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"  # of the archive
_NAME = f"{PACKAGE}-{VERSION}"
_MEMBER = f"{_NAME}/data/alpaca_en_demo.json"


def fetch_archive(cache: Path) -> Path:
    """Returns the path of the verified archive, downloaded on first use.

    Raises:
      NaloraError: pip failed, or the archive has another content.
    """
    path = cache / "packages" / f"{_NAME}.tar.gz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(path)
    if (digest := file_digest(path)) != SHA256:
        remedy = "delete it and run again: the download was damaged, or another file is served"
        raise NaloraError(str(path), expected=f"sha256 {SHA256}", found=digest, remedy=remedy)
    return path


def _download(path: Path) -> None:
    """Downloads the archive to ``path``."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
        command += ["--dest", scratch, f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archive = Path(scratch) / path.name
        if done.returncode != 0 or not archive.exists():
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
            remedy = f"check the network, or copy the source archive to {path}"
            expected = "pip to download its source archive"
            raise NaloraError(
                f"package {PACKAGE}=={VERSION}", expected=expected, found=reason[0], remedy=remedy
            )
        archive.replace(path)


def selected(records: list[dict[str, str]], most: int) -> list[dict[str, str]]:
    """Returns the first record of each instruction and input, of at most ``most`` characters (0: any number)."""
    first: dict[tuple[str, str], dict[str, str]] = {}
    for record in records:
        first.setdefault((record["instruction"], record["input"]), record)
    return [record for record in first.values() if not most or sum(map(len, record.values())) <= most]


@register_source("alpaca_demo")
def open_alpaca_demo(argument: str, split: str) -> Source:
    """Returns a slice of the instructions of at most ``argument`` characters."""
    if argument and not argument.isdecimal():
        raise NaloraError(f"alpaca_demo:{argument}", expected="a number of characters", found=argument)
    archive = fetch_archive(cache_dir())
    path = archive.with_name(f"{_NAME}-alpaca_en_demo-{argument or 'all'}.json")
    if not path.exists():
        with tarfile.open(archive) as members:
            content = members.extractfile(_MEMBER)
            assert content is not None, "the checksum fixes the archive's members"
            records = selected(json.load(content), int(argument or 0))
        scratch = path.with_suffix(f".{os.getpid()}")  # several processes may work on a study
        scratch.write_text(json.dumps(records), encoding="utf-8")
        scratch.replace(path)
    return FileSource(path, split)
