"""The report page in a real Chromium: what it shows, loads, runs, and lets be run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from checkpoints import SMALL, write_checkpoint
from quantmill.creation import create
from quantmill.modelreport import describe_models
from quantmill.names import parse_name
from quantmill.reportpage import report_page
from quantmill.store import Store

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

HOSTILE = "</script><img src=x onerror=window.owned=1>"
LAYERS = 3
MATRICES = ("self_attn.q_proj", "mlp.down_proj")
CELLS = LAYERS * (len(MATRICES) + 1)
READABLE = 4.5
"""The contrast that WCAG 2.2 asks for text of this size (success criterion 1.4.3)."""

EVALUATION = {
    "model": "tiny:int4",
    "kl": {"mean": 0.46, "p99": 2.1, "<b>bold</b>": 1},
    "kl_histogram": {"edges": [0, 0.01, 0.1, 1, 10], "counts": [5, 80, 40, 2]},
}


def tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": SMALL["model.embed_tokens.weight"]
    }
    for layer in range(LAYERS):
        for part in MATRICES:
            found[f"model.layers.{layer}.{part}.weight"] = ("BF16", (128, 128))
        found[f"model.layers.{layer}.input_layernorm.weight"] = ("BF16", (128,))
    return found | {f"model.{HOSTILE}.weight": ("BF16", (4, 64)), "\u202egnp.w": ("F32", (1,))}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about two models, one of them evaluated, with hostile names."""
    folder = tmp_path_factory.mktemp("report")
    config = {"model_type": HOSTILE, "num_hidden_layers": LAYERS}
    source = write_checkpoint(folder / "sour<ce>&", tensors(), config)
    store = Store(folder / "store")
    names = [parse_name(name) for name in ("tiny:int4", "tiny:nvfp4")]
    for name in names:
        create(name, source, store=store, quantize=name.tag)
    models = describe_models(store, names, evaluations=[EVALUATION])
    (folder / "report.html").write_bytes(report_page(models))
    return folder / "report.html"


class Strict(HTMLParser):
    """Checks that elements are nested as they are closed, and collects what the tests ask for."""

    VOID = frozenset({"meta", "input", "wbr", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        self.texts[where] = self.texts.get(where, "") + data


def test_the_page_is_well_formed_and_refers_to_nothing(page_file: Path) -> None:
    """Every element is closed where it must be; no address but anchors, no handler, no image."""
    found = Strict()
    found.feed(page_file.read_text(encoding="utf-8"))
    assert found.open == []
    assert not {"img", "iframe", "link", "object", "b"} & set(found.tags)
    assert found.tags.count("script") == 2
    addresses = [value for name, value in found.attributes if name in {"src", "href", "action"}]
    assert addresses
    assert all(str(address).startswith("#") for address in addresses)
    assert not [name for name, _ in found.attributes if name.startswith("on")]


def test_the_page_is_the_same_every_time(page_file: Path) -> None:
    """Equal models give equal bytes."""
    store = Store(page_file.parent / "store")
    names = [parse_name(name) for name in ("tiny:int4", "tiny:nvfp4")]
    models = describe_models(store, names, evaluations=[EVALUATION])
    assert report_page(models) == page_file.read_bytes()


# -- in the browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser that is installed here; skips, in CI fails, without one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        assert not os.environ.get("CI"), "chromium must be installed in CI"
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    if not find_spec("playwright"):
        assert not os.environ.get("CI"), "playwright must be installed in CI"
        pytest.skip("playwright, which drives the browser, is not installed")
    from playwright import sync_api as playwright

    with playwright.sync_playwright() as started:
        # containers give no right to make sandboxes of their own
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """The page in a context of its own, offline, and what went on in it."""

    def __init__(self, browser: Browser, file: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.requests: list[str] = []
        self.context: BrowserContext = browser.new_context(offline=True, **options)
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def test_it_opens_offline_without_a_word(chromium: Browser, page_file: Path) -> None:
    """One request, that of the file itself; nothing on the console."""
    with Opened(chromium, page_file) as opened:
        opened.page.wait_for_load_state("networkidle")
        assert opened.page.locator("h1").inner_text() == "tiny:int4 \u00b7 tiny:nvfp4"
        assert opened.requests == [page_file.as_uri()]
        assert opened.said == []


def test_hostile_names_are_shown_and_not_run(chromium: Browser, page_file: Path) -> None:
    """A tensor, an architecture and a number may be called like markup."""
    with Opened(chromium, page_file) as opened:
        page = opened.page
        assert page.evaluate("window.owned") is None
        assert page.locator("img").count() == 0
        assert page.locator(".facts").first.inner_text().count(HOSTILE) == 2
        for details in page.locator("details summary").all():
            details.click()
        page.locator(".map td").first.hover()
        assert HOSTILE in page.locator(".every").first.inner_text()
        data = json.loads(page.locator("#report").text_content() or "")
        assert f"model.{HOSTILE}.weight" in [t["name"] for t in data["models"][0]["tensors"]]
        # and a script that got in all the same could not run
        page.evaluate("document.body.append(document.createElement('script'))")
        page.evaluate("document.body.lastChild.textContent = 'window.owned = 1'")
        page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<p onclick=\"owned=1\">p</p>')"
        )
        page.locator("p").last.click()
        assert page.evaluate("window.owned") is None


def test_the_heat_map_has_a_cell_for_each_tensor(chromium: Browser, page_file: Path) -> None:
    """Layers down, kinds across, one map for each model, and what is in no layer beside it."""
    with Opened(chromium, page_file) as opened:
        maps = opened.page.locator("#map table.map")
        assert maps.count() == 4
        first = maps.nth(0)
        assert first.locator("td.heat").count() == CELLS
        assert first.locator("tbody tr").count() == LAYERS
        heads = first.locator("thead th").all_inner_texts()
        found = ["".join(head.split()) for head in heads]
        assert found == ["Layer", "mlp.down_proj", "self_attn.q_proj", "input_layernorm"]
        cells = first.locator("tbody tr").first.locator("td").all_inner_texts()
        assert cells == ["8.5", "4.5", "16"]


def colours(page: Page, selector: str) -> list[list[float]]:
    """Text colour and background of elements, as they are painted: two triples of 0 to 255."""
    found: list[list[float]] = page.evaluate(
        """(selector) => {
          const canvas = document.createElement("canvas");
          const context = canvas.getContext("2d", { willReadFrequently: true });
          function paint(colours) {
            context.clearRect(0, 0, 1, 1);
            for (const colour of colours) {
              context.fillStyle = colour;
              context.fillRect(0, 0, 1, 1);
            }
            return Array.from(context.getImageData(0, 0, 1, 1).data).slice(0, 3);
          }
          return Array.from(document.querySelectorAll(selector), (node) => {
            const behind = [];
            for (let at = node; at; at = at.parentElement) {
              behind.unshift(getComputedStyle(at).backgroundColor);
            }
            const ground = paint(["#fff", ...behind]);
            return [...paint(["#fff", ...behind, getComputedStyle(node).color]), ...ground];
          });
        }""",
        selector,
    )
    assert found
    return found


def luminance(colour: list[float]) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
              for c in (value / 255 for value in colour)]  # fmt: skip
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colour: list[float]) -> float:
    """The contrast ratio of the two colours (WCAG 2.2)."""
    dark, light = sorted((luminance(colour[:3]), luminance(colour[3:])))
    return (light + 0.05) / (dark + 0.05)


TEXTS = "h1, h2, h3, p, a, th, td, caption, summary, figcaption, button, footer span, .switch span"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(chromium: Browser, page_file: Path, scheme: Any) -> None:
    """Contrast of all text, also on the strongest colours of both scales."""
    with Opened(chromium, page_file, color_scheme=scheme) as opened:
        for metric in ("bits", "error"):
            opened.page.locator(f"#metric-{metric}").check(force=True)
            # the ends of the scale, whether or not a cell has them
            opened.page.evaluate(
                "document.querySelectorAll('.map .heat').forEach((cell, at) => at % 2 &&"
                " (cell.style.cssText = '--b: 1; --e: 1'))"
            )
            assert min(map(contrast, colours(opened.page, TEXTS))) >= READABLE


def test_dark_mode_turns_the_colours_round(chromium: Browser, page_file: Path) -> None:
    """Dark text on light ground, and light text on dark ground."""
    grounds = {}
    for scheme in ("light", "dark"):
        options: dict[str, Any] = {"color_scheme": scheme}
        with Opened(chromium, page_file, **options) as opened:
            (colour,) = colours(opened.page, "h1")
            grounds[scheme] = luminance(colour[3:])
    assert grounds["dark"] < 0.05
    assert grounds["light"] > 0.8


@pytest.mark.parametrize("script", [True, False])
def test_the_switch_shows_errors(chromium: Browser, page_file: Path, script: bool) -> None:
    """Numbers and colours of cells change with it, also where no script runs."""
    with Opened(chromium, page_file, java_script_enabled=script) as opened:
        cell = opened.page.locator("table.map td.heat").nth(1)
        before = cell.inner_text()
        opened.page.locator(".switch label", has_text="Relative error").click()
        after = cell.inner_text()
        assert before == "4.5"
        assert after != before
        assert 0.001 < float(after) < 0.1
        if script:
            bits = colours(opened.page, "table.map td.heat")[1]
            opened.page.locator(".switch label", has_text="Bits per weight").click()
            assert colours(opened.page, "table.map td.heat")[1] != bits


def test_nothing_is_wider_than_a_phone(chromium: Browser, page_file: Path) -> None:
    """At 400 pixels the page scrolls down only; wide tables scroll within themselves."""
    with Opened(chromium, page_file, viewport={"width": 400, "height": 800}) as opened:
        for details in opened.page.locator("details summary").all():
            details.click()
        widths = opened.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths == [400, 400]


def test_cells_are_told_to_the_keyboard(chromium: Browser, page_file: Path) -> None:
    """One stop for Tab in each map, arrow keys from there, the exact values below."""
    with Opened(chromium, page_file) as opened:
        page = opened.page
        assert page.locator("table.map").first.locator("td[tabindex='0']").count() == 1
        page.locator("table.map td").first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        told = page.locator(".readout").first.inner_text()
        assert told.startswith("model.layers.1.self_attn.q_proj.weight: int4, 128 x 128, 9.2 kB, ")
        assert "4.500 bits per weight, relative error 0.0" in told
        assert told.endswith(", as requested")


def test_the_table_of_tensors_is_sorted_and_filtered(chromium: Browser, page_file: Path) -> None:
    """By its heads, up and down, and by a text."""
    with Opened(chromium, page_file) as opened:
        page = opened.page
        page.locator("#tensors summary").first.click()
        table = page.locator("table.every").first
        head = table.locator("th", has_text="Bits per weight")
        head.locator("button").click()
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        bits = [float(text) for text in table.locator("tbody td:nth-child(5)").all_inner_texts()]
        assert bits == sorted(bits, reverse=True)
        page.locator("#tensors input").first.fill("q_proj")
        assert table.locator("tbody tr:visible").count() == LAYERS


def test_an_evaluation_is_drawn(chromium: Browser, page_file: Path) -> None:
    """A column for each count, the numbers beside it; the other model says that it has none."""
    with Opened(chromium, page_file) as opened:
        section = opened.page.locator("#evaluation")
        assert section.locator("rect").count() == 4
        heights = [float(r.get_attribute("height") or 0) for r in section.locator("rect").all()]
        assert heights.index(max(heights)) == 1
        assert "kl mean" in section.inner_text()
        assert "Not evaluated." in section.inner_text()
