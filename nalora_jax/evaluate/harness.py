"""Adapter of this library's models to EleutherAI's lm-evaluation-harness (the extra ``eval``).

from lm_eval import simple_evaluate
from nalora_jax.evaluate.harness import harness_model

results = simple_evaluate(harness_model(model, variables, tokenizer), tasks=["arc_easy"])
"""

from __future__ import annotations

import itertools
import json
import operator
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from nalora_jax.common.digests import digest_of
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate import GenerationSettings, Generator
from nalora_jax.evaluate.intervals import compare, difference_of_means
from nalora_jax.evaluate.likelihood import Score, score_groups
from nalora_jax.models.decoder import Decoder


def harness_model(
    model: Decoder,
    variables: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    mesh: Mesh | None = None,
) -> Any:
    """Returns an ``lm_eval.api.model.LM`` for a model of this library.

    Args:
      model: the decoder.
      variables: ``params``, and ``lora`` if there are adapters.
      tokenizer: tokenizer of the model.
      mesh: mesh of the weights, if they are sharded.

    Raises:
      NaloraError: lm-eval is not installed.
    """
    require_harness()
    from lm_eval.api.model import LM

    class NaloraLM(Requests, LM):
        """`Requests` as an instance of the harness's own class, which it requires."""

        def __init__(self, generator: Generator) -> None:
            LM.__init__(self)
            Requests.__init__(self, generator)

    return NaloraLM(Generator(model, variables, tokenizer, mesh=mesh))


def require_harness() -> None:
    """Raises a NaloraError with installation instructions if lm-eval is missing."""
    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError as error:
        raise NaloraError(
            "lm-eval",
            expected="the package",
            found="not installed",
            remedy="pip install 'nalora_jax[eval]'",
        ) from error


class Requests:
    """The three kinds of requests of the harness; a request's ``args`` hold its texts."""

    def __init__(self, generator: Generator) -> None:
        """Stores the generator, its maximum length and the token that starts a text."""
        self._generator = generator
        self._longest = generator.max_length
        # The context of texts without one: begin-of-text, or else end-of-text.
        tokenizer = generator.tokenizer
        if tokenizer.bos_id is None:
            self._start = tokenizer.eos_id
        else:
            self._start = tokenizer.bos_id

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Returns log-likelihoods of continuations, and True if greedy decoding yields them."""
        pairs = [self._pair(*request.args) for request in requests]
        return [(score.log_prob, score.greedy) for score in self._scores(pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Returns the log-likelihood of each request's whole text.

        A text is scored in windows of the context's length, whose log-likelihoods are summed.
        """
        windows = []
        text_numbers = []  # of each window, the number of its text
        for number, request in enumerate(requests):
            ids = self._encode(request.args[0])
            windows_of_text = _windows(ids, self._start, self._longest)
            windows += windows_of_text
            text_numbers += [number] * len(windows_of_text)
        sums = [0.0] * len(requests)
        for number, score in zip(text_numbers, self._scores(windows), strict=True):
            sums[number] += score.log_prob
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Returns the completion of each request, generated up to its stop texts.

        Requests with equal settings share batches. A context that leaves no room for the
        completion loses its first tokens.
        """
        batches: dict[str, list[int]] = {}  # numbers of requests by their settings
        for number, request in enumerate(requests):
            batches.setdefault(repr(request.args[1]), []).append(number)
        texts: dict[int, str] = {}
        for _, numbers in sorted(batches.items()):
            options = generation_settings(requests[numbers[0]].args[1])
            room = self._longest - options["max_new_tokens"]
            if room < 1:
                raise NaloraError(
                    "max_gen_toks",
                    expected=f"below {self._longest}",
                    found=options["max_new_tokens"],
                )
            prompts = []
            for number in numbers:
                ids = self._encode(requests[number].args[0])
                prompts.append(ids[-room:] or [self._start])
            completions = self._generator.generate(prompts, **options)
            texts |= zip(numbers, completions, strict=True)
        return [texts[number] for number in range(len(requests))]

    def apply_chat_template(
        self,
        chat_history: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
    ) -> str:
        """Formats a conversation with the model's chat template."""
        return self._generator.tokenizer.render_chat(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    @property
    def tokenizer_name(self) -> str:
        """Returns the name for the harness's caches: a fingerprint, since file names repeat."""
        return digest_of(self._generator.tokenizer.backend.to_str())[:16]

    def _encode(self, text: str) -> list[int]:
        """Returns token ids with one begin-of-text token if the model requires it.

        A second one, from a chat template, is removed.
        """
        tokenizer = self._generator.tokenizer
        ids = tokenizer.encode(text)
        bos = tokenizer.bos_id
        if tokenizer.add_bos and ids[:2] == [bos, bos]:
            return ids[1:]
        return ids

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the token ids of a context and its continuation, split like in the harness.

        Trailing spaces of the context belong to the continuation. An empty context becomes the
        start token. What exceeds the model's length is cut from the left.
        """
        if not context:
            ids = self._generator.tokenizer.encode(continuation, special=False)
            ids = ids[-self._longest :]
            # A text that starts with the start token has its context already.
            if ids[:1] == [self._start] and len(ids) > 1:
                return (ids[:1], ids[1:])
            return ([self._start], ids)
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        joined = self._encode(bare + continuation)
        before = self._encode(bare)
        room = self._longest + 1  # the last token is only predicted
        context_ids = joined[: len(before)]
        ids = joined[len(before) :]
        ids = ids[-self._longest :]
        return context_ids[-(room - len(ids)) :], ids

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Returns the score of each (context ids, continuation ids), in order.

        Adjacent pairs with equal contexts form a group, whose context is computed once.
        """
        by_context = itertools.groupby(pairs, key=operator.itemgetter(0))
        groups = [list(group) for _, group in by_context]
        generator = self._generator
        scored = score_groups(
            generator.model,
            generator.variables,
            groups,
            mesh=generator.mesh,
        )
        return list(itertools.chain(*scored))


def _windows(
    ids: list[int],
    start: int,
    longest: int,
) -> list[tuple[list[int], list[int]]]:
    """Splits ``ids`` into disjoint windows of up to ``longest`` tokens, each with its context.

    A window's context is the token before it, for the first window ``start``. The last window has
    as much context as fits before it.

    Returns:
      Pairs (context ids, ids of the window).

    Example (a context of 3 tokens, start token 0):
      >>> _windows([5, 6, 7, 8], 0, 3)
      [([0], [5, 6, 7]), ([6, 7], [8])]
    """
    windows = []
    for begin in range(0, len(ids), longest):
        end = min(begin + longest, len(ids))
        context = [start]
        if begin:
            # The model reads all tokens but the last, so that context and window together have
            # one token more than fit.
            context = ids[max(0, end - longest - 1) : begin]
        windows.append((context, ids[begin:end]))
    return windows


_NEW_TOKENS = 256  # default of the harness


def generation_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns this library's settings for ``generation_kwargs`` of the harness.

    Raises:
      NaloraError: they are not settings by name, or a value has another type.
    """
    if not isinstance(options, Mapping):
        raise NaloraError(
            "generation_kwargs", expected="settings by name", found=repr(options)[:80]
        )
    limit = options.get("max_new_tokens", _NEW_TOKENS)
    stop = options.get("until") or ()
    if isinstance(stop, str):
        stop = (stop,)
    temperature = options.get("temperature")
    if not temperature:
        # 1 if it samples, 0 (greedy) otherwise
        temperature = float(bool(options.get("do_sample")))
    settings = {
        "max_new_tokens": options.get("max_gen_toks", limit),
        "stop": stop,
        "temperature": temperature,
    }
    names = ["repetition_penalty"]
    if temperature:  # the filters have no effect on greedy decoding
        names += ["top_k", "top_p", "min_p"]
    for name in names:
        if options.get(name) is not None:
            settings[name] = options[name]
    try:
        GenerationSettings(**settings)
    except NaloraError as error:
        where = f"generation_kwargs: {error.where}"
        raise NaloraError(
            where,
            expected=error.expected,
            found=error.found,
            remedy=error.remedy,
        ) from error
    return settings


# ---------------------------------------------------------------- tasks


def run_harness(
    model: Any,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int = 0,
    shots: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Runs the harness's evaluation of its tasks.

    Args:
      model: from `nalora_jax.evaluate.harness.harness_model`.
      tasks: names of tasks or groups.
      folder: folder of additional task files (YAML).
      limit: maximum number of items per task; 0: all.
      shots: few-shot examples before each question; None: the task's default.
      chat: format prompts with the model's chat template.

    Returns:
      ``results`` (metrics by task, with the harness's names), ``versions`` of the tasks, and
      ``samples``: by task, one JSON-able record per item, with its ``doc_id`` and its value of
      every metric.

    Raises:
      NaloraError: lm-eval is not installed, a task is unknown, or its data is not available.
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    own_tasks = None
    if folder is not None:
        own_tasks = str(folder)
    manager = TaskManager(include_path=own_tasks)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise NaloraError(
            "--harness",
            expected="tasks of lm-evaluation-harness",
            found=", ".join(unknown),
            remedy="lm-eval ls tasks lists them; --harness-tasks names a folder of your own",
        )
    try:
        results = simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit or None,
            apply_chat_template=chat,
            log_samples=True,
            bootstrap_iters=0,
            task_manager=manager,
        )
    except NaloraError:
        raise
    except Exception as error:
        if _through_this_package(error):
            raise
        raise NaloraError(
            f"--harness {','.join(tasks)}",
            expected="tasks that the harness can load and run",
            found=f"{type(error).__name__}: {error}",
            remedy="tasks come from the hub unless their YAML names local files; "
            "see docs/serving.md",
        ) from error
    assert results is not None, "the harness returns None on other processes only"
    samples = {}
    for task, rows in results["samples"].items():
        samples[task] = list(map(_record, rows))
    return {
        "results": _plain(results["results"]),
        "versions": _plain(results.get("versions", {})),
        "samples": samples,
    }


def _through_this_package(error: BaseException) -> bool:
    """Returns True if the harness had called the model when the error was raised.

    Its traceback then passes through a module of this package below `run_harness`. Other errors
    are of the harness, `datasets` and Jinja: of a task's YAML, data or templates.
    """
    modules = [
        frame.f_globals.get("__name__", "")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    # the first is `run_harness`
    return any(name.startswith("nalora_jax.") for name in modules[1:])


def compare_samples(
    other: Sequence[Mapping[str, Any]], model: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Compares ``model`` with ``other`` on one task: ``model`` minus ``other`` by metric.

    Metrics that are 0 or 1 are compared by McNemar's test, others by a paired bootstrap.

    Args:
      other, model: ``samples`` of `run_harness` of the same task.

    Raises:
      NaloraError: the samples are not of the same items.
    """
    ids = []  # of both models, the (item, filter) of each sample
    for rows in (other, model):
        ids.append([(sample["doc_id"], sample.get("filter")) for sample in rows])
    if ids[0] != ids[1] or not model:
        items = "other items"
        if not model:
            items = "no item"
        raise NaloraError(
            "--against", expected="answers to the same items", found=items
        )
    differences: dict[str, Any] = {}
    for metric in model[0]["metrics"]:
        before = _values(other, metric)
        after = _values(model, metric)
        ones = np.ones_like(before)  # every item has the same weight
        if set(np.unique([before, after])) <= {0.0, 1.0}:
            differences[metric] = compare(before, after)
        elif np.isfinite([before, after]).all():
            differences[metric] = difference_of_means(before, ones, after, ones)
    return differences


def _values(samples: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray:
    """Returns a metric of each sample, float ``[samples]``, NaN where it is missing."""
    return np.array([sample["metrics"].get(metric, np.nan) for sample in samples])


def _record(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one of the harness's samples as JSON values: its fields, and ``metrics`` by name."""
    record: dict[str, Any] = {}
    for name in ("doc_id", "filter", "doc", "target", "arguments", "filtered_resps"):
        if name in sample:
            record[name] = _plain(sample[name])
    metrics = {}
    for name in sample["metrics"]:
        value = sample[name]
        if isinstance(value, int | float | np.number):
            metrics[name] = float(value)
    return record | {"metrics": metrics}


def _plain(value: Any) -> Any:
    """Returns ``value`` as JSON types; values of other types become their text."""
    return json.loads(json.dumps(value, default=str))
