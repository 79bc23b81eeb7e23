"""The HTML page of a report: what is in it, that nothing in it is taken for markup, and that it works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import pytest

from llaisys.diff import Report
from llaisys.diff.drift_chart import drift_chart
from llaisys.diff.html import EDGES, level, number, shown, to_html
from reports import HOSTILE, REPORTS, clean_report, faulty_report, nan_report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
VOID = {"meta", "line", "polyline", "br", "link", "img", "input"}


class Page(HTMLParser):
    """Elements as (tag, attributes, text), and whether tags are closed in the order in which they were opened."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        text: list[str] = []
        self.elements.append((tag, dict(attrs), text))
        if tag not in VOID:
            self.open.append((tag, text))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, (tag, self.open[-1:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for _, text in self.open:
            text.append(data)

    def of(self, tag: str, name: str = "") -> list[tuple[dict[str, str | None], str]]:
        return [
            (a, "".join(text))
            for t, a, text in self.elements
            if t == tag and name in ["", *(a.get("class") or "").split(" ")]
        ]

    @property
    def data(self) -> dict[str, object]:
        (text,) = (text for a, text in self.of("script") if a.get("type") == "application/json")

        def refuse(name: str) -> None:
            raise AssertionError(name)

        return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", REPORTS)
def test_page_is_whole_and_alone(name: str) -> None:
    """Every tag is closed, every site is there once, the data is JSON, and nothing is loaded from anywhere."""
    report = REPORTS[name]()
    html = to_html(report)
    html.encode("utf-8")
    page = Page(html)
    assert not page.open
    for tag, attributes, _ in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert "src" not in attributes and not any(key.startswith("on") for key in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in html and "@import" not in html
    policy = next(a["content"] for a, _ in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert (policy or "").startswith("default-src 'none'")
    data = page.data
    sites = list(dict.fromkeys(node.site for node in report.nodes)) + [f.site for f in report.faults]
    assert [site for site, _ in data["sites"]] == list(dict.fromkeys(sites))  # type: ignore[attr-defined]
    cells = sorted(int(a["data-i"] or -1) for a, _ in page.of("button", "cell"))
    assert cells == list(range(len(data["sites"])))  # type: ignore[arg-type]
    assert len(data["nodes"]) == len(report.nodes)  # type: ignore[arg-type]


def test_verdicts() -> None:
    for report, status, title in (
        (clean_report(), "certified", "Certified"),
        (faulty_report(), "fault", "LOCAL fault at model.layers.2.self_attn.rope_k"),
        (REPORTS["suspect"](), "inconclusive", "Inconclusive: 3 suspect nodes"),
        (REPORTS["empty"](), "inconclusive", "Inconclusive: nothing was checked"),
    ):
        page = Page(to_html(report))
        assert page.of("header", status) and page.of("h1")[0][1] == title


def test_a_fault_is_told_in_full() -> None:
    report = faulty_report()
    text = Page(to_html(report)).of("article", "fault")[0][1]
    fault = report.faults[0]
    for part in (fault.message, *fault.shape, fault.hypothesis, fault.swap, f"llaisys replay {fault.reproducer}"):
        assert part is not None and part in text
    assert "Also in" in text and "decode 1" in text
    marked = [a for a, symbol in Page(to_html(report)).of("button", "isfault") if symbol == "×"]
    assert [a["aria-label"] for a in marked] == [f"{fault.site}, rope: fault, ratio 342"]
    tokens = "".join(text for _, text in Page(to_html(report)).of("section"))
    assert "more than rounding explains" in tokens and "no evidence of a fault" in tokens


def test_hostile_texts_are_texts() -> None:
    html = to_html(REPORTS["hostile"]())
    page = Page(html)
    assert len(page.of("script")) == 2 and "<script>alert" not in html and "49" not in page.of("h1")[0][1]
    assert not any(x in html for x in ("\u202e", "\ud800", "\x00"))
    seen = "".join(text for _, text in page.of("article", "fault"))
    assert seen.count("<script>alert(1)</script>&amp;'{{ 7 * 7 }}\\u202e\\x00\\ud800") >= 8
    assert HOSTILE in [site for site, _ in page.data["sites"]]  # type: ignore[attr-defined]


def test_numbers_and_levels() -> None:
    assert [number(x) for x in (0.0, 0.98, 1e-9, 1234567.0, float("inf"), float("nan"))] == [
        *("0", "0.98", "1e−9", "1.23e6", "∞", "NaN")
    ]
    assert [level(x) for x in (0.0, 1e-4, 1.0, 1.001, 1e9, float("inf"), float("nan"))] == [0, 1, 5, 6, 8, 8, 8]
    assert len(EDGES) == 8
    assert shown("a\n\u202e") == "a\\n\\u202e"


def test_chart_has_gaps_and_all_steps() -> None:
    report = nan_report()
    sites = list(dict.fromkeys(node.site for node in report.nodes))
    chart = drift_chart(report.drift, sites, number)
    assert chart is not None and chart["steps"] == ["0", "1"] and len(chart["odd"]) == 2
    lines = {(g["step"], g["series"]): g["lines"] for g in chart["groups"]}
    assert len(lines["0", "reference"]) == 2 and len(lines["1", "reference"]) == 1
    assert drift_chart([], sites, number) is None
    assert [text for _, text in chart["x_ticks"]] == list("01234")


def test_page_of_a_deep_model_is_bounded() -> None:
    begin = time.perf_counter()
    html = to_html(faulty_report(28, 9))
    assert len(html) < 1 << 20
    assert time.perf_counter() - begin < 30  # seconds; it is about half a second


def test_a_prompt_and_a_notebook_show_it() -> None:
    report = faulty_report(28, 9)
    assert repr(report).startswith(f"<Report of {report.model} in {report.dtype}: FAULT: ")
    assert len(repr(report)) < 300
    assert report._repr_html_().startswith("<iframe srcdoc=")


def test_report_survives_json() -> None:
    for name in ("faulty", "nan", "suspect"):
        report = REPORTS[name]()
        assert to_html(Report.from_json(report.to_json())) == to_html(report)


# ------------------------------------------------------------------ in a browser

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--virtual-time-budget=2000"),
)


def browse(tmp_path: Path, html: str, *flags: str, fragment: str = "") -> str:
    """What Chromium prints of a page, or fails the test with what it complains about."""
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    command = [
        BROWSER or "",
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        *flags,
        path.as_uri() + fragment,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pixels(path: Path) -> tuple[int, int, bytes]:
    """Width, height and the filtered bytes of the rows of a PNG."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", raw[16:24])
    at, parts = 8, []
    while at < len(raw):
        (size,) = struct.unpack(">I", raw[at : at + 4])
        if raw[at + 4 : at + 8] == b"IDAT":
            parts.append(raw[at + 8 : at + 8 + size])
        at += size + 12
    return width, height, zlib.decompress(b"".join(parts))


@needs_browser
@pytest.mark.parametrize("size", ["1366,768", "390,844"])
def test_it_is_drawn(size: str, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    browse(tmp_path, to_html(faulty_report()), f"--window-size={size}", f"--screenshot={shot}")
    width, height, rows = pixels(shot)
    assert f"{width},{height}" == size
    drawn = sum(1 for byte in rows if byte)  # a blank page is filtered to zeros but for its first row
    assert drawn > 10 * width


@needs_browser
def test_a_link_opens_the_details_of_a_site(tmp_path: Path) -> None:
    """The script ran: the table of the chosen site has a row per step, with what the report says."""
    report = faulty_report()
    site = "model.layers.3.mlp.act"
    dom = browse(tmp_path, to_html(report), "--dump-dom", fragment="#" + urlencode({"site": site, "step": "2"}))
    table = dom[dom.index(f'data-site="{site}"') :]
    rows = re.findall(r"<tr.*?</tr>", table[: table.index("</table>")], re.S)
    assert len(rows) == 1 + 9 and all(step in "".join(rows) for step in ("prefill", "decode 8"))
    node = next(node for node in report.nodes if node.site == site and node.step == 2)
    chosen = next(row for row in rows if 'class="now"' in row)
    assert f"{node.ratio:.3g}" in chosen and "decode 2" in chosen and "all 224" in chosen


@needs_browser
def test_a_click_and_a_key_choose_a_cell(tmp_path: Path) -> None:
    report = faulty_report()
    sites = list(dict.fromkeys(node.site for node in report.nodes))
    i, below = (sites.index(f"model.layers.{layer}.self_attn.v_proj") for layer in (1, 2))
    act = f"""<script>
        const cell = document.querySelector('[data-i="{i}"]');
        cell.click();
        const shown = document.querySelector("#details table").dataset.site;
        cell.focus();
        cell.dispatchEvent(new KeyboardEvent("keydown", {{key: "ArrowDown", bubbles: true}}));
        document.title = [shown, location.hash, document.activeElement.dataset.i].join(" ");
    </script></body>"""
    dom = browse(tmp_path, to_html(report).replace("</body>", act), "--dump-dom")
    assert f"<title>{sites[i]} #site={sites[i]} {below}</title>" in dom


@needs_browser
def test_hostile_texts_do_nothing_in_a_browser(tmp_path: Path) -> None:
    dom = browse(tmp_path, to_html(REPORTS["hostile"]()), "--dump-dom", fragment="#" + urlencode({"site": "nothing"}))
    assert dom.count("<script") == 2 and "alert(1)</script>" not in dom.replace("&lt;", "").split("<script")[0]
