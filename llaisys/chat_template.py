"""Renders a chat template: a program that came with a model, in the language of Jinja.

Jinja's sandbox keeps a template from files and from Python's internals, but not from running for hours or from asking
for a terabyte: loops nest, and `*`, `~`, `replace`, `center`, `format`, block assignments and more can each multiply
the length of a text. No list of those is complete, so the template runs in a process of its own with limits that the
operating system enforces: `LIMITS` for CPU seconds, memory and the length of the text, and a wall clock for the whole.
That costs about a tenth of a second a prompt.

This file is that process as well. It is started as a script, by its path and isolated from the environment, so that
neither the package nor numpy is loaded there. Request and answer are JSON on stdin and stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["LIMITS", "TemplateRefused", "render"]

#: CPU seconds, wall seconds, bytes of memory, characters of the result.
LIMITS = {"cpu": 4, "wall": 20, "memory": 512 << 20, "output": 4 << 20}


class TemplateRefused(Exception):
    """A template that does not render."""

    def __init__(self, message: str, by_template: bool = False) -> None:
        """`by_template`: the template itself refused the messages (raise_exception); else it is faulty."""
        super().__init__(message)
        self.by_template = by_template


def render(template: str, variables: dict[str, Any], limits: dict[str, int] | None = None) -> str:
    """The text that `template` makes of `variables`, which must be plain JSON data (TypeError or ValueError if not).

    Raises `TemplateRefused`.
    """
    import importlib.util
    import subprocess

    limits = {**LIMITS, **(limits or {})}
    # The script's own search path is the standard library; it gets the places of these two and nothing else.
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    path = [str(Path(spec.origin).parent.parent) for spec in specs if spec and spec.origin]
    request = json.dumps({"template": template, "variables": variables, "limits": limits, "path": path})
    if not sys.executable:
        raise TemplateRefused("there is no Python executable to render it with")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(Path(__file__).resolve())],
            input=request.encode(),
            capture_output=True,
            timeout=limits["wall"],
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TemplateRefused(f"it ran for more than {limits['wall']} s") from None
    except OSError as error:
        raise TemplateRefused(f"the process to render it in did not start: {error}") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        reason = f"exit status {done.returncode}"
        if done.returncode < 0:
            reason = f"signal {-done.returncode}, as for more than {limits['cpu']} s of CPU time"
        raise TemplateRefused(f"its process ended with {reason}") from None
    if "text" in answer:
        return str(answer["text"])
    raise TemplateRefused(answer["message"], answer["by_template"])


def _limit_process(limits: dict[str, int]) -> None:
    try:
        import resource
    except ImportError:  # no POSIX: the wall clock and the length remain
        return

    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu"]),
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS
            continue


def _render(template: str, variables: dict[str, Any], limit: int) -> str:
    """Render in this process with the environment that transformers gives to chat templates."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < (3, 1, 6):
        raise TemplateRefused(f"jinja2 {jinja2.__version__} has holes in its sandbox; 3.1.6 or later is needed")

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what the assistant said, for training; here it is its body."""

        tags = {"generation"}  # noqa: RUF012, it is Jinja's interface

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """Jinja's namespace checks no names; dunder attributes are a way to Python's internals."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace takes no attribute {name!r}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **attributes: Any) -> Namespace:
        result = Namespace()
        for name, value in dict(*args, **attributes).items():
            result[name] = value
        return result

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own escapes HTML characters.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: Any) -> None:
        raise TemplateRefused(str(message), by_template=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    environment.globals["namespace"] = namespace
    # A function, not the class, which has attributes.
    environment.globals["dict"] = lambda *args, **items: dict(*args, **items)

    parts: list[str] = []
    length = 0
    for part in environment.from_string(template).generate(**variables):
        length += len(part)
        if length > limit:
            raise TemplateRefused(f"its text is longer than {limit} characters")
        parts.append(part)
    return "".join(parts)


def _main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    sys.path.extend(request["path"])
    _limit_process(request["limits"])
    answer: dict[str, Any]
    try:
        answer = {"text": _render(request["template"], request["variables"], request["limits"]["output"])}
    except TemplateRefused as error:
        answer = {"message": str(error)[:500], "by_template": error.by_template}
    except MemoryError:
        answer = {"message": f"it needs more than {request['limits']['memory']} bytes", "by_template": False}
    except Exception as error:
        answer = {"message": f"{type(error).__name__}: {str(error)[:400]}", "by_template": False}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main()
