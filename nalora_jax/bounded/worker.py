"""Helper process of `bounded`: renders chat templates and matches regular expressions.

Each line of standard input is one request. The file is run by its path and imports no module of
this library, so that it starts in 0.1 s. It runs untrusted programs: it has little memory, an alarm
ends it if a request takes too long, and its only output is its answers.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from typing import Any

MEMORY = 512 << 20  # bytes of address space
_MAX_ERROR = 500  # characters of a program's error message that are returned


def serve(seconds: float) -> None:
    """Answers requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    environment = chat_environment()
    _limit_memory()
    _answer({"answer": "ready"})
    template = None
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            request = json.loads(line)
            if "patterns" in request:
                answer: Any = match_all(**request)
            elif "expressions" in request:
                answer = len(split_by(**request))
            else:
                if request["template"] is not None:
                    template = environment.from_string(request["template"])
                assert template is not None
                began = time.process_time()
                texts = zip(request["render"], request["limits"], strict=True)
                rendered = [_checked(template.render(variables), limit) for variables, limit in texts]
                answer = {"texts": rendered, "seconds": time.process_time() - began}
            text = json.dumps({"answer": answer})
        except Exception as error:  # an untrusted program may raise any error
            text = json.dumps({"error": _complaint(error)})
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _limit_memory() -> None:
    import resource

    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        _, most = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _checked(text: str, limit: int) -> str:
    if len(text) > limit:
        raise ValueError(f"a text of more than {limit:,} characters")
    return text


def _complaint(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"more than {MEMORY >> 20} MB of memory"
    return f"{type(error).__name__}: {str(error)[:_MAX_ERROR]}"


def match_all(patterns: list[str], names: list[str], how: str) -> list[list[str | None]]:
    """Matches patterns; see `bounded.matches`."""
    matches: list[list[str | None]] = []
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except Exception as error:  # re.error, OverflowError, RecursionError
            raise ValueError(f"{pattern[:100]!r}: {error}") from error
        match = getattr(compiled, how)
        matches.append([_index(match(name)) for name in names])
    return matches


def _index(match: re.Match[str] | None) -> str | None:
    """Returns the group ``idx`` of a match, "" without such a group; None if there is no match."""
    if match is None:
        return None
    return match.groupdict().get("idx") or ""


def split_by(expressions: list[str], text: str) -> list[list[Any]]:
    """Returns the parts of the text by each of the expressions; see `bounded.split`."""
    import tokenizers

    pieces = []
    for expression in expressions:
        try:
            rule = tokenizers.Regex(expression)
        except Exception:
            continue  # the tokenizer's constructor refuses expressions that do not compile
        pieces.append(tokenizers.pre_tokenizers.Split(rule, "isolated").pre_tokenize_str(text))
    return pieces


def chat_environment() -> Any:
    """Returns the jinja2 environment of chat templates: sandboxed, with the additions of transformers."""
    from datetime import datetime

    import jinja2
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(jinja2.ext.Extension):
        """Renders the body of ``{% generation %} ... {% endgeneration %}``, which marks an assistant's text."""

        tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

        def parse(self, parser: Any) -> Any:
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(lineno)

    def to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
        """Returns JSON without HTML escapes, which jinja2's filter adds and no model was trained on."""
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


if __name__ == "__main__":
    serve(float(sys.argv[1]))
