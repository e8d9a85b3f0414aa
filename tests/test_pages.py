"""The built pages in a browser: they load without a network, fit a phone, and their charts show what is stored."""

import csv
import functools
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api

from book import pdf

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
PAGES = sorted(str(file.relative_to(SITE)) for kind in ("book", "notebooks") for file in (SITE / kind).glob("*.html"))
SIZES = {"desktop": (1280, 900), "phone": (400, 800)}
# sphinx-thebe, which jupyter-book loads on every page, writes its settings twice; nothing else hangs on them.
KNOWN = "Identifier 'THEBE_JS_URL' has already been declared"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the site, served on this machine."""
    if not PAGES:
        pytest.fail(f"there are no pages in {SITE}: run `make book` first")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=pdf.chromium(), args=pdf.FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser, address, request):
    """A page of a size, which notes what goes wrong and what it asks of other sites."""
    width, height = SIZES[getattr(request, "param", "desktop")]
    context = browser.new_context(viewport={"width": width, "height": height})
    opened = context.new_page()
    opened.wrong, opened.outside = [], []
    opened.on("console", lambda said: opened.wrong.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: opened.wrong.append(str(error)) if str(error) != KNOWN else None)
    opened.on(
        "request",
        lambda asked: (
            opened.outside.append(asked.url) if not asked.url.startswith((address, "data:", "blob:")) else None
        ),
    )
    yield opened
    context.close()


def ready(page, url: str) -> None:
    page.goto(url)
    page.wait_for_function(pdf.DRAWN)


@pytest.mark.parametrize("page", SIZES, indirect=True)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_alone_and_fits(page, address: str, name: str) -> None:
    ready(page, f"{address}/{name}")
    assert page.wrong == []
    assert page.outside == []
    for spacing in ("0", "0.1em"):  # fonts of other machines are wider
        page.add_style_tag(content=f"article * {{ letter-spacing: {spacing} !important; }}")
        too_wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert too_wide <= 1, f"{name} scrolls sideways by {too_wide} pixels with letters {spacing} apart"
    broken = page.evaluate(
        "[...document.images].filter(each => each.complete && !each.naturalWidth).map(each => each.src)"
    )
    assert broken == []
    silent = page.evaluate(
        "[...document.querySelectorAll('article img')].filter(each => !each.alt).map(each => each.src)"
    )
    assert silent == []


@pytest.mark.parametrize("name", [page for page in PAGES if page in ("book/intro.html", "book/ladder.html")])
def test_all_findings_of_the_tiles_are_in_sight_on_a_desktop(page, address: str, name: str) -> None:
    ready(page, f"{address}/{name}")
    hidden = page.evaluate("[...document.querySelectorAll('.tiles')].map(each => each.scrollWidth - each.clientWidth)")
    assert hidden
    assert max(hidden) <= 1, f"{name} hides {max(hidden)} pixels of its tiles"


@pytest.mark.parametrize("name", PAGES)
def test_every_link_inside_the_site_is_alive(page, address: str, name: str) -> None:
    page.goto(f"{address}/{name}")
    links = page.evaluate("[...document.querySelectorAll('a[href]')].map(each => each.href)")
    dead = []
    for link in {link for link in links if link.startswith(address)}:
        path, _, anchor = link.removeprefix(f"{address}/").partition("#")
        file = SITE / path.partition("?")[0]
        if not file.exists() or (anchor and file.suffix == ".html" and f'id="{anchor}"' not in file.read_text()):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", SIZES, indirect=True)
@pytest.mark.parametrize("name", [page for page in PAGES if page.startswith("notebooks")])
def test_the_answer_and_the_first_figure_are_on_the_first_screen(page, address: str, name: str) -> None:
    ready(page, f"{address}/{name}")
    places = page.evaluate(
        """() => {
            const top = each => each ? each.getBoundingClientRect().top + window.scrollY : 1e9;
            return [top(document.querySelector('article strong')), top(document.querySelector('article a.verdict')),
                    top(document.querySelector('article div.cell_output figure, article div.cell_output img'))];
        }"""
    )
    height = page.viewport_size["height"]
    assert max(places) < height, f"answer, verdict and figure of {name} begin at {places}, of {height} pixels"


def test_the_slider_moves_the_law_and_the_points_are_those_that_are_stored(page, address: str) -> None:
    ready(page, f"{address}/notebooks/00_what_rank_measures.html")
    figure = page.locator("figure.interactive")
    spec = json.loads(figure.locator("script").inner_text())
    heads = [row for rows in spec["datasets"].values() for row in rows if "model" in row] if "datasets" in spec else [
        row for layer in spec["layer"] for row in layer.get("data", {}).get("values", []) if "model" in row
    ]  # fmt: skip
    assert len(heads) == 144 + 192
    marks = figure.locator("svg g.mark-symbol.role-mark path[aria-roledescription='point']")
    assert marks.count() >= len(heads)
    said = figure.locator("svg text", has_text="half-life")
    before = said.all_text_contents()
    slider = figure.locator("input[type=range]").nth(2)
    slider.focus()
    for _ in range(9):
        slider.press("ArrowRight")
    page.wait_for_timeout(300)
    after = figure.locator("svg text", has_text="tokens: rank").text_content()
    # 2 ** (9 / 4) tokens; the law: 1 + 13.288 half-lives
    assert after not in before
    assert "half-life 4.76 tokens: rank 64.0 of 64" in after


def test_the_head_explorer_marks_as_many_heads_as_the_slider_says(page, address: str) -> None:
    ready(page, f"{address}/notebooks/03_ablation_asymmetry.html")
    figures = page.locator("figure.interactive")
    assert figures.count() == 2
    for figure in figures.all():
        move_the_slider(page, figure)


def move_the_slider(page, figure) -> None:
    crosses = figure.locator("svg g.mark-symbol path[stroke-width='2.5'][stroke='white']")
    slider = figure.locator("input[type=range]")
    shown = int(slider.input_value())
    assert crosses.count() == shown
    slider.focus()
    slider.press("ArrowRight")
    page.wait_for_timeout(300)
    assert crosses.count() == shown + 1
    figure.locator("select").nth(1).select_option("low rank")
    page.wait_for_timeout(300)
    assert crosses.count() == shown + 1


@pytest.mark.parametrize("name", ["00_what_rank_measures", "03_ablation_asymmetry"])
def test_the_numbers_in_a_chart_are_those_of_the_file_under_it(page, address: str, name: str) -> None:
    ready(page, f"{address}/notebooks/{name}.html")
    shown = []
    for script in page.locator("figure.interactive script").all_inner_texts():
        shown += [row for row in rows_of(json.loads(script)) if row]
    figure = {"00": "fig-law", "03": "fig-explorer"}[name[:2]]
    [link] = page.locator(f"a.download[href*='{figure}.csv']").all()
    text = page.request.get(link.evaluate("each => each.href")).text()
    stored = [{key: value for key, value in row.items() if value} for row in csv.DictReader(text.splitlines())]
    for row in stored if name[:2] == "03" else ():
        row.pop("model")  # each has a chart of its own
    assert sorted(tuple(sorted(row.items())) for row in stored) == sorted(
        tuple(sorted((key, str(value)) for key, value in row.items())) for row in shown
    )


def rows_of(spec: Any) -> list[dict[str, Any]]:
    """All data inside a specification."""
    if isinstance(spec, list):
        return [row for each in spec for row in rows_of(each)]
    if not isinstance(spec, dict):
        return []
    return [
        *spec.get("data", {}).get("values", []),
        *(row for key, each in spec.items() if key != "data" for row in rows_of(each)),
    ]


def test_charts_have_a_picture_without_a_script_and_change_with_the_theme(browser, address: str, page) -> None:
    context = browser.new_context(java_script_enabled=False)
    still = context.new_page()
    still.goto(f"{address}/notebooks/00_what_rank_measures.html")
    assert still.locator("figure.interactive img").is_visible()
    context.close()
    ready(page, f"{address}/notebooks/00_what_rank_measures.html")
    assert not page.locator("figure.interactive img").is_visible()
    axis = page.locator("figure.interactive svg g.role-axis-label text").first
    light = axis.get_attribute("fill")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_timeout(500)
    assert axis.get_attribute("fill") != light
