"""The process in which `run_isolated` runs: arguments as JSON on stdin, events as lines of JSON on what was stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from typing import Any

from ..errors import LlaisysError


def main() -> None:
    """Run, and tell."""
    # Whatever prints to stdout must not get between the events.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(kind: str, *values: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            events.write(json.dumps([kind, *values]) + "\n")
            events.flush()

    options = json.loads(sys.stdin.read())
    try:
        from .run import run

        tell("started")  # whatever ends the process from here on is a fault of the library
        report = run(**options, progress=lambda scene, step, site: tell("at", scene, step, site))
        tell("report", report.to_json())
    except (LlaisysError, MemoryError, ImportError, OSError) as error:
        tell("error", type(error).__name__, str(error), getattr(error, "__module__", ""))
    except Exception as error:
        traceback.print_exc()
        tell("error", "InternalError", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
