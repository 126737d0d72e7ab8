"""The page at `/` without a browser: what it loads, its labels, contrast, policy; `test_page_in_browser` uses it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mixencoder.serving.page import content_policy
from tests.serving.cases import DOCUMENTS

PAGE = Path(__file__).parents[2] / "mixencoder" / "serving" / "page.html"
VOID = {"meta", "link", "input", "br", "hr", "img"}


class Elements(HTMLParser):
    """The elements of a page, with their attributes; raises for a tag that is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


@pytest.fixture(scope="module")
def text() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def elements(text) -> list:
    return Elements(text).found


def test_the_page_needs_no_key_and_says_what_may_run(serve, text):
    client = serve(api_keys=("a-key-of-some-length",))
    response = client.get("/")
    assert response.status_code == 200
    assert response.text == text
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["content-security-policy"] == content_policy(text)
    demo = client.get("/demo")
    assert demo.status_code == 200
    assert len(demo.text.splitlines()) > 100
    assert client.get("/info").status_code == 401


def test_it_loads_nothing_from_elsewhere(text, elements):
    links = [attrs.get(name) for _, attrs in elements for name in ("src", "href", "action") if name in attrs]
    assert links == ["data:,"]
    assert not re.findall(r"https?:|@import|url\(|//\w", text)
    policy = content_policy(text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert policy.count("sha256-") == 2
    # an attribute would be a style or a script that the policy stops
    assert not [attrs for _, attrs in elements if any(name == "style" or name.startswith("on") for name in attrs)]


def test_every_field_has_a_label_and_ids_are_distinct(elements, text):
    ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    labelled = {attrs["for"] for tag, attrs in elements if tag == "label" and "for" in attrs}
    assert labelled <= set(ids)
    inside = set(re.findall(r"<label[^>]*>(?:(?!</label>).)*<input([^>]*)>", text))
    fields = [attrs for tag, attrs in elements if tag in ("input", "textarea")]
    for attrs in fields:
        wrapped = any(all(f'{name}="{value}"' in one for name, value in attrs.items() if value) for one in inside)
        assert attrs.get("id") in labelled or wrapped, attrs
    referred = " ".join(attrs.get("aria-describedby", "") for _, attrs in elements).split()
    assert set(referred) <= set(ids)
    assert ("html", {"lang": "en"}) in elements
    assert [attrs["content"] for tag, attrs in elements if attrs.get("name") == "viewport"]


def test_every_element_that_the_script_names_is_in_the_page(elements, text):
    ids = {attrs["id"] for _, attrs in elements if "id" in attrs}
    named = set(re.findall(r'\bat\("([\w-]+)"\)', text))
    assert named
    assert named <= ids


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def colours(text: str) -> list[dict[str, str]]:
    blocks = re.findall(r":root \{(.*?)\}", text, flags=re.S)
    return [dict(re.findall(r"(--[\w-]+): (#\w{6})", block)) for block in blocks]


def test_text_has_a_contrast_of_4_5_and_borders_of_3_in_both_modes(text):
    both = colours(text)
    assert len(both) == 2
    for mode in both:
        words = [f"--word-{step}" for step in range(1, 5)]
        for front, backs in {
            "--text": ["--page", "--panel", *words],
            "--muted": ["--page", "--panel"],
            "--error": ["--page", "--panel", "--error-page"],
            "--on-accent": ["--accent"],
        }.items():
            for back in backs:
                assert contrast(mode[front], mode[back]) >= 4.5, (front, back, contrast(mode[front], mode[back]))
        for front, back in (
            ("--line", "--page"),
            ("--accent", "--page"),
            ("--accent", "--track"),
            ("--accent", "--panel"),
        ):
            assert contrast(mode[front], mode[back]) >= 3, (front, back, contrast(mode[front], mode[back]))


def test_the_script_is_javascript(text, tmp_path):
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.S)
    (tmp_path / "page.js").write_text(script)
    subprocess.run(["node", "--check", str(tmp_path / "page.js")], check=True)


def test_the_page_is_packaged(text):
    import tomllib

    settings = tomllib.loads((PAGE.parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["mixencoder"]
    assert {"serving/page.html", "cli/demo.txt"} <= set(patterns)


def test_answers_say_how_long_they_took(client):
    response = client.post("/rerank", json={"query": "dog", "texts": DOCUMENTS})
    assert float(re.fullmatch(r"total;dur=([\d.]+)", response.headers["server-timing"])[1]) > 0
