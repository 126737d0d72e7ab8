"""docs/integrations.md: every example runs as printed, with the real framework and the bundled model."""

import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest

from mixencoder import MissingExtraError
from tests.project.test_docs import DOCS, python_and_output

PAGE = DOCS / "integrations.md"
FRAMEWORKS = {
    "LangChain": "langchain_core",
    "LlamaIndex": "llama_index.core",
    "Haystack": "haystack",
    "PyTerrier": "pyterrier",
    "MTEB": "mteb",
    "rerankers": "rerankers",
    "sentence-transformers": "sentence_transformers",
}


def sections() -> dict[str, str]:
    """Return the page's text by heading, "" for what comes before the first."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_every_section_is_a_framework_and_every_framework_has_a_module():
    assert set(sections()) == {"", *FRAMEWORKS}
    folder = Path(importlib.import_module("mixencoder.integrations").__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "shared"}
    named = re.findall(r"^\| .* \| `mixencoder\.integrations\.(\w+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.M)
    assert set(named) == modules
    assert len(modules) == len(FRAMEWORKS)


@pytest.mark.parametrize(
    ("module", "framework", "package"),
    [
        ("langchain", "langchain_core.cross_encoders", "langchain-core"),
        ("llama_index", "llama_index.core.schema", "llama-index-core"),
        ("haystack", "haystack", "haystack-ai"),
        ("pyterrier", "pyterrier", "pyterrier"),
        ("mteb", "mteb.models", "mteb"),
        ("rerankers", "rerankers.documents", "rerankers"),
    ],
)
def test_an_adapter_without_its_framework_says_what_to_install(module, framework, package, monkeypatch):
    monkeypatch.setitem(sys.modules, framework, None)
    monkeypatch.delitem(sys.modules, f"mixencoder.integrations.{module}", raising=False)
    with pytest.raises(MissingExtraError, match=f"this adapter needs {package}: pip install {package} "):
        importlib.import_module(f"mixencoder.integrations.{module}")


@pytest.mark.parametrize("heading", FRAMEWORKS)
def test_examples_print_what_stands_below(heading, tmp_path, monkeypatch, capsys):
    pytest.importorskip(FRAMEWORKS[heading], reason=f"{heading} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text, names = sections(), {}
    for code, expected in [*python_and_output(text[""]), *python_and_output(text[heading])]:
        capsys.readouterr()
        exec(compile(code, heading, "exec"), names)
        printed = capsys.readouterr().out
        if expected is not None:
            assert doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS), printed
