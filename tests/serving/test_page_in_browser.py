"""The page at `/` in headless Chromium, driven by Playwright: rank, explain, an error shown well, empty input.

Skipped where Playwright or Chromium is missing: on Debian ``pip install playwright`` and ``apt-get install chromium``.
With MIXENCODER_TEST_SCREENSHOTS=DIR pictures of the page with the bundled model are written there.
"""

import os
import shutil
from pathlib import Path

import pytest

from tests.serving.cases import DOCUMENTS, IDS, QUERY, expected
from tests.serving.server_process import running

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium", allow_module_level=True)
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1000, "height": 1100}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # root needs --no-sandbox; nothing but our own page is opened
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(calibrated, stored):
    with running("--model", calibrated, "--index", str(stored)) as (_, address, _):
        yield address


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport=DESKTOP)
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda request: problems.append(request.url) if not request.url.startswith((address, "data:")) else None,
    )
    page.problems = problems
    page.goto(address)
    playwright.expect(page.get_by_text("Model tiny")).to_be_visible()
    yield page
    context.close()


def ask(page, query=QUERY, documents=DOCUMENTS):
    page.get_by_label("Query").fill(query)
    page.get_by_label("Candidates, one per line").fill("\n".join(documents))
    page.get_by_role("button", name="Rank", exact=True).click()


def results(page):
    return page.locator("#results button")


def test_the_ranking_is_the_models_with_its_probabilities(page, model):
    ask(page)
    playwright.expect(results(page)).to_have_count(len(DOCUMENTS))
    right = expected(model, QUERY)
    assert results(page).locator(".text").all_inner_texts() == [DOCUMENTS[index] for index, _ in right]
    shown = [float(text.rstrip("%")) for text in results(page).locator(".percent").all_inner_texts()]
    assert shown == pytest.approx([100 * score for _, score in right], abs=0.51)
    widths = [bar.bounding_box()["width"] for bar in results(page).locator(".fill").all()]
    assert widths == sorted(widths, reverse=True)
    playwright.expect(page.locator("#status")).to_contain_text("5 candidates ranked in")
    playwright.expect(page.locator("#status")).to_contain_text("on the server")
    assert page.problems == []


def test_hovering_and_focus_show_which_words_a_candidate_attends_to(page, model):
    ask(page)
    first, second = (DOCUMENTS[index] for index, _ in expected(model, QUERY)[:2])
    results(page).nth(1).hover()
    panel = page.locator("#explained")
    playwright.expect(panel.get_by_role("heading")).to_contain_text("Candidate 2")
    playwright.expect(panel).to_contain_text(second)
    results(page).nth(0).focus()
    playwright.expect(panel.get_by_role("heading")).to_contain_text("Candidate 1")
    found = model.explain(QUERY, first)
    playwright.expect(panel).to_contain_text(f"Score {found.score:.2f} = interaction {found.interaction:.2f}")
    words = sorted(found.query_words(), key=lambda word: -word.weight)
    share = words[0].weight / sum(word.weight for word in words)
    playwright.expect(panel).to_contain_text(f"Most of the attention to words: {words[0].text} {share:.0%}")
    strongest = panel.locator("mark.word-4").all_inner_texts()
    assert words[0].text in strongest
    assert page.problems == []


def test_the_keyboard_alone_is_enough(page, model):
    page.get_by_label("Candidates, one per line").fill("\n".join(DOCUMENTS))
    page.get_by_label("Query").focus()
    page.keyboard.type(QUERY)
    page.keyboard.press("Enter")
    playwright.expect(results(page)).to_have_count(len(DOCUMENTS))
    page.get_by_role("button", name="Rank", exact=True).focus()
    page.keyboard.press("Tab")
    focused = page.evaluate("document.activeElement.innerText")
    assert DOCUMENTS[expected(model, QUERY)[0][0]] in focused
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Tab")
    playwright.expect(page.locator("#explained h2")).to_contain_text("Candidate 2")


def test_empty_input_says_what_is_missing_and_focuses_it(page):
    page.get_by_role("button", name="Rank", exact=True).click()
    playwright.expect(page.get_by_text("Type a query.")).to_be_visible()
    playwright.expect(page.get_by_label("Query")).to_be_focused()
    assert page.get_by_label("Query").get_attribute("aria-invalid") == "true"
    page.get_by_label("Query").fill(QUERY)
    playwright.expect(page.get_by_text("Type a query.")).to_be_hidden()
    page.get_by_role("button", name="Rank", exact=True).click()
    playwright.expect(page.get_by_text("Add at least one candidate")).to_be_visible()
    playwright.expect(page.get_by_label("Candidates, one per line")).to_be_focused()


def test_an_error_of_the_server_is_shown_and_goes_away(page):
    ask(page, documents=["dog"] * 1001)
    alert = page.get_by_role("alert")
    playwright.expect(alert).to_contain_text("1,001 documents; this server takes at most 1,000")
    playwright.expect(results(page)).to_have_count(0)
    ask(page)
    playwright.expect(alert).to_be_hidden()
    playwright.expect(results(page)).to_have_count(len(DOCUMENTS))


def test_a_busy_or_stopped_server_is_said_in_plain_words(page):
    page.route("**/rerank", lambda route: route.fulfill(status=429, headers={"Retry-After": "7"}, json={"error": "x"}))
    ask(page)
    playwright.expect(page.get_by_role("alert")).to_have_text("The server is busy. Try again in 7 seconds.")
    page.unroute("**/rerank")
    page.route("**/rerank", lambda route: route.abort())
    ask(page)
    playwright.expect(page.get_by_role("alert")).to_contain_text("cannot be reached")


def test_the_index_and_the_demo_list_are_a_click_away(page):
    page.get_by_label("the server's index (5 candidates)").check()
    playwright.expect(page.get_by_label("Candidates, one per line")).to_be_hidden()
    page.get_by_label("Query").fill(QUERY)
    page.get_by_role("button", name="Rank", exact=True).click()
    playwright.expect(results(page)).to_have_count(len(IDS))
    results(page).nth(0).focus()
    playwright.expect(page.locator("#explained h2")).to_contain_text("Candidate 1")
    page.get_by_label("the texts below").check()
    page.get_by_role("button", name="Try the demo list").click()
    playwright.expect(results(page)).to_have_count(100)
    playwright.expect(page.get_by_text("more with lower scores")).to_be_visible()


def test_texts_are_shown_as_text(page):
    texts = ["<img src=x onerror=alert(1)>", "<b>dog</b> \u202e cat", "水 \U0001f600 dog"]
    ask(page, "<script>alert(1)</script> \U0001f600 dog", texts)
    playwright.expect(results(page)).to_have_count(3)
    assert set(results(page).locator(".text").all_inner_texts()) == set(texts)
    for number in range(3):
        results(page).nth(number).focus()
        playwright.expect(page.locator("#explained h2")).to_contain_text(f"Candidate {number + 1}")
        assert "Query: <script>alert(1)</script> \U0001f600 dog" in page.locator("#explained").inner_text()
    assert page.problems == []


def test_a_server_with_keys_asks_for_one(browser, calibrated):
    key = "a-key-that-is-long-enough"
    with running("--model", calibrated, environment={"MIXENCODER_API_KEYS": key}) as (_, address, _):
        page = browser.new_page()
        page.goto(address)
        playwright.expect(page.get_by_role("alert")).to_contain_text("needs an API key")
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Tab")
        playwright.expect(page.get_by_text("Model tiny")).to_be_visible()
        ask(page)
        playwright.expect(results(page)).to_have_count(len(DOCUMENTS))
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser, address, scheme):
    page = browser.new_page(viewport=PHONE, color_scheme=scheme)
    page.goto(address)
    ask(page, documents=[*DOCUMENTS, "x" * 300, "a long text " * 40])
    playwright.expect(results(page)).to_have_count(len(DOCUMENTS) + 2)
    results(page).nth(0).focus()
    playwright.expect(page.locator("#explained h2")).to_contain_text("Candidate 1")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for button in page.locator("button, label.button").all():
        assert button.bounding_box()["height"] >= 44
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)")
    page.close()


def test_screenshots(browser):
    folder = os.environ.get("MIXENCODER_TEST_SCREENSHOTS")
    if not folder:
        pytest.skip("MIXENCODER_TEST_SCREENSHOTS names no folder")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with running() as (_, address, _):
        for name, viewport, scheme in (("page", DESKTOP, "light"), ("page-phone-dark", PHONE, "dark")):
            page = browser.new_page(viewport=viewport, color_scheme=scheme)
            page.goto(address)
            # twice, as the first ranking of a process is slow
            for _ in range(2):
                with page.expect_response("**/rerank"):
                    page.get_by_role("button", name="Try the demo list").click()
                playwright.expect(page.locator("#status")).to_contain_text("ranked in")
            playwright.expect(results(page)).to_have_count(100)
            results(page).nth(0).focus()
            playwright.expect(page.locator("#explained h2")).to_contain_text("Candidate 1")
            if name != "page":
                page.locator("#status").scroll_into_view_if_needed()
            page.screenshot(path=Path(folder) / f"{name}.png")
            page.close()
