"""The built pages in a browser: they load without a network, fit a phone, and their charts show what is stored."""

import csv
import functools
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api

from book import pdf
from staterank_utils.models import EMBEDDED
from staterank_utils.studies.repeated import DAMAGE, LOG_HALF_LIFE, measures_of, stored_on

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
    links = page.evaluate(
        "[...document.querySelectorAll('a[href]')].filter(each => !each.closest('[hidden]')).map(each => each.href)"
    )
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
    if page.viewport_size["width"] > 1000:
        drawn = "each => each.getBoundingClientRect().bottom + window.scrollY"
        picture = page.locator("article div.cell_output figure svg.marks, article div.cell_output img").first
        assert picture.evaluate(drawn) <= height, f"the figure of {name} does not end on the first screen"


@pytest.mark.parametrize("page", SIZES, indirect=True)
@pytest.mark.parametrize("name", ["book/intro.html", "book/ladder.html"])
def test_tiles_or_their_answer_are_on_the_first_screen(page, address: str, name: str) -> None:
    ready(page, f"{address}/{name}")
    top, bottom = page.evaluate(
        "() => { const box = document.querySelector('article .tiles').getBoundingClientRect(); return [box.top, box.bottom]; }"
    )
    height = page.viewport_size["height"]
    assert top < height
    if name == "book/intro.html" and page.viewport_size["width"] > 1000:
        assert bottom <= height


def test_the_slider_moves_the_law_and_the_points_are_those_that_are_stored(page, address: str) -> None:
    ready(page, f"{address}/notebooks/00_what_rank_measures.html")
    figure = page.locator("figure.interactive")
    spec = json.loads(figure.locator("script").inner_text())
    heads = [row for row in rows_of(spec) if "model" in row]
    assert sorted(Counter((row["run"], row["model"]) for row in heads).items()) == [
        (("stored", "hybrid"), 144), (("stored", "pure"), 192), (("this run", "hybrid"), 144), (("this run", "pure"), 192),
    ]  # fmt: skip
    for model in EMBEDDED:
        ranks = stored_on(model)[0].groups["end"].rank["prose"].mean(0)
        shown = [row["r4"] for row in heads if (row["run"], row["model"]) == ("stored", model)]
        assert shown == pytest.approx(ranks.tolist(), abs=6e-3)
    marks = figure.locator("svg g.mark-symbol.role-mark path[aria-roledescription='point']")
    assert marks.count() >= len(heads)
    threshold = figure.locator("input[type=range]").first
    threshold.focus()
    threshold.press("ArrowRight")
    page.wait_for_timeout(300)
    assert marks.count() < len(heads)  # of other thresholds nothing is stored
    threshold.press("ArrowLeft")
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


@pytest.mark.parametrize("page", SIZES, indirect=True)
def test_the_head_explorer_marks_as_many_heads_as_the_slider_says(page, address: str) -> None:
    ready(page, f"{address}/notebooks/03_ablation_asymmetry.html")
    figures = page.locator("figure.interactive")
    assert figures.count() == 2
    for figure in figures.all():
        move_the_slider(page, figure)


@pytest.mark.parametrize("page", SIZES, indirect=True)
def test_the_head_explorer_tells_the_stored_numbers_of_a_head(page, address: str) -> None:
    """Chosen by keys, as one does without a mouse."""
    ready(page, f"{address}/notebooks/03_ablation_asymmetry.html")
    for model, figure in zip(EMBEDDED, page.locator("figure.interactive").all(), strict=True):
        measured = stored_on(model)[0]
        removal, more = measured.removal, measures_of(model)
        layers = sorted({layer for layer, _ in removal.heads})
        figure.locator("select").nth(2).select_option(str(layers[1]))
        slider = figure.locator("input[type=range]").nth(1)
        slider.focus()
        for _ in range(3):
            slider.press("ArrowRight")
        page.wait_for_timeout(300)
        place = removal.heads.index((layers[1], 3))
        told = figure.locator("svg text", has_text="to go").text_content()
        assert told.startswith(f"layer {layers[1]}, head 3: number {1 + removal.places('high rank')[place]} to go")
        numbers = [float(each.replace("\u2212", "-")) for each in re.findall(r"[\u2212-]?\d+(?:\.\d+)?", told)]
        expected = [removal.rank[place] / removal.d, more[LOG_HALF_LIFE][place], more[DAMAGE][place]]
        shown = [numbers[3], numbers[5], numbers[6]]  # behind layer, head and place, and the 2 of log2
        assert shown == pytest.approx(expected, rel=6e-3, abs=6e-4)


def test_a_tap_on_a_phone_tells_the_numbers_of_a_head(browser, address: str) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 800}, has_touch=True, is_mobile=True)
    page = context.new_page()
    ready(page, f"{address}/notebooks/03_ablation_asymmetry.html")
    figure = page.locator("figure.interactive").first
    told = figure.locator("svg text", has_text="to go")
    before = told.text_content()
    cell = figure.locator("svg g.mark-rect path").nth(5)
    cell.scroll_into_view_if_needed()
    cell.tap()
    page.wait_for_timeout(300)
    assert told.text_content() != before
    assert "nats added without it" in told.text_content()
    assert figure.locator("input[type=range]").nth(1).input_value() in told.text_content()
    context.close()


def move_the_slider(page, figure) -> None:
    crosses = figure.locator("svg g.mark-symbol path[stroke-width='2.5'][stroke='white']")
    slider = figure.locator("input[type=range]").first
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


def test_the_pdf_is_linked_whole_and_has_its_fonts(page, address: str) -> None:
    page.goto(f"{address}/book/intro.html")
    link = page.locator("p.whole-book a")
    assert link.is_visible(), "run `make pdf` first"
    file = SITE / link.evaluate("each => new URL(each.href).pathname").lstrip("/")
    content = file.read_bytes()
    assert content.startswith(b"%PDF-")
    assert content.rstrip().endswith(b"%%EOF")
    objects = dict(re.findall(rb"\n(\d+) 0 obj\n(.*?)endobj", content, re.DOTALL))
    described = {number for number, text in objects.items() if b"/Type /FontDescriptor" in text}
    bare = {number for number in described if not re.search(rb"/FontFile[23]? ", objects[number])}
    # Fonts of type 3 hold their glyphs as drawings, and need no file.
    drawn = [text for text in objects.values() if b"/Subtype /Type3" in text]
    drawn_with = {number for text in drawn for number in re.findall(rb"/FontDescriptor (\d+) 0 R", text)}
    assert described
    assert bare <= drawn_with, "a font is not embedded"
    n_figures = sum((SITE / name).read_text().count("<figure") for name in PAGES if name.startswith("notebooks"))
    assert content.count(b"/Subtype /Image") >= n_figures / 2  # what is drawn as lines is no image
    assert len(re.findall(rb"/Type /Page\b", content)) > len(PAGES)


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
