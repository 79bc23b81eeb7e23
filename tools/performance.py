"""Put figures into docs/performance.md: `performance.py RESULTS.json [MORE.json ...]`.

The files are of `llaisys bench --json` or `pytest --benchmark-only --benchmark-json`. The machine and its roofs are
those of the first, the rows those of all. What stands between the two marks of the page is replaced.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llaisys.bench import report

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: performance.py RESULTS.json [MORE.json ...]")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{PAGE}: expected the lines {BEGIN.strip()} and {END.strip()}, found neither or one")
    data = report.read(sys.argv[1])
    for more in sys.argv[2:]:
        data["rows"] += report.read(more)["rows"]
    PAGE.write_text(before + BEGIN + "\n" + report.markdown(data) + "\n" + END + after)


if __name__ == "__main__":
    main()
