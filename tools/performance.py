"""Put the figures of a run into docs/performance.md: `performance.py RESULTS.json`.

RESULTS.json is of `llaisys bench --json` or `pytest --benchmark-only --benchmark-json`. What stands between the two
marks of the page is replaced.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llaisys.bench import report

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: performance.py RESULTS.json")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{PAGE}: expected the lines {BEGIN.strip()} and {END.strip()}, found neither or one")
    PAGE.write_text(before + BEGIN + "\n" + report.markdown(report.read(sys.argv[1])) + "\n" + END + after)


if __name__ == "__main__":
    main()
