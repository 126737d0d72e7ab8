"""README and docs as readers use them: links lead somewhere, Python runs as printed, commands have those flags."""

import doctest
import importlib
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from typer.main import get_command

from mixencoder.cli import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "mixencoder" / "pretrained" / "README.md"])
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.S | re.M)
PACKAGES = ("mixencoder", "mixencoder.peers", "mixencoder.evaluation", "mixkernels")
MODULE_RUNNERS = {"python", "python3", "ncu", "torchrun"}
OTHER_PROGRAMS = {
    "cp",
    "curl",
    "git",
    "mkdir",
    "ncu",
    "proton-viewer",
    "pyrefly",
    "pytest",
    "ruff",
    "sphinx-build",
    "venv",
}
OTHER_PROGRAMS |= {
    ".ci/run",
    ".ci/instruction_sets",
    ".ci/kernels_layout",
    ".ci/integrations",
    ".ci/package",
    ".ci/versions",
    "triton.profiler.proton",
}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# -- links -------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that a repository browser gives a page's headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", FENCED.sub("", text_of(page)), flags=re.M):
        plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if not number else f"{slug}-{number}" for slug, last in found.items() for number in range(last + 1)}


def links(page: Path) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text_of(page)))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"\w+:", link)]


@pytest.mark.parametrize("page", [page for page in PAGES if links(page)], ids=name)
def test_every_link_and_anchor_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: headings there are {sorted(anchors(target))}"


def test_pages_of_the_site_link_no_page_that_the_site_lacks():
    included = runpy.run_path(str(DOCS / "conf.py"))["INCLUDED"]
    outside = [
        link
        for page in DOCS.glob("*.md")
        for link in links(page)
        if link.partition("#")[0].endswith(".md") and link.startswith("../")
    ]
    assert set(outside) <= set(included), "Sphinx ends with an error there"


def test_every_page_of_the_docs_is_linked_from_their_front_page():
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in links(DOCS / "README.md")}
    assert {page for page in DOCS.glob("*.md") if page.name != "README.md"} <= linked


def test_the_reference_has_every_public_name():
    reference = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.rst"))
    documented = re.findall(r"^\.\. auto(?!module)\w+:: ([\w.]+)\.(\w+)$", reference, flags=re.M)
    # by what they are: a name may be documented where it is defined
    found = {id(getattr(importlib.import_module(module), attribute)) for module, attribute in documented}
    for name in re.findall(r"^\.\. automodule:: ([\w.]+)$", reference, flags=re.M):
        values = vars(importlib.import_module(name)).values()
        found |= {id(value) for value in values if getattr(value, "__module__", None) == name}
    for package in map(importlib.import_module, PACKAGES):
        missing = [public for public in package.__all__ if id(getattr(package, public)) not in found]
        assert not missing, f"{package.__name__}: {missing}"


def test_every_environment_variable_is_on_its_page_and_read_somewhere():
    variable = r"(?:MIXKERNELS|MIXENCODER)_[A-Z_]+[A-Z]"
    folders = ("mixencoder", "mixkernels", "benchmarks", "tests")
    sources = [source for folder in folders for source in (ROOT / folder).rglob("*.py") if source != Path(__file__)]
    read = {found for source in sources for found in re.findall(variable, source.read_text(encoding="utf-8"))}
    assert set(re.findall(variable, text_of(DOCS / "environment.md"))) == read


# -- Python ------------------------------------------------------------------------------------------------------------


def python_and_output(text: str) -> Iterator[tuple[str, str | None]]:
    """Each block of Python, and the block of text that directly follows it: what it prints."""
    blocks = list(FENCED.finditer(text))
    for block, following in pairwise([*blocks, None]):
        if block[1] == "python":
            prints = following and following[1] == "text" and not page_between(block, following).strip()
            yield block[2], following[2] if prints else None


def has_python(page: Path) -> bool:
    """Whether a page has Python that needs nothing but this project; tests/integrations runs what needs more."""
    return page.name != "integrations.md" and any(python_and_output(text_of(page)))


def page_between(first: re.Match, second: re.Match) -> str:
    return first.string[first.end() : second.start()]


@pytest.mark.parametrize("page", [page for page in PAGES if has_python(page)], ids=name)
def test_python_runs_as_printed_and_prints_what_stands_below(page, tmp_path, monkeypatch, capsys):
    # what it writes belongs nowhere else
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict = {}
    checker = doctest.OutputChecker()
    for code, expected in python_and_output(text_of(page)):
        capsys.readouterr()
        exec(compile(code, name(page), "exec"), names)
        printed = capsys.readouterr().out
        if expected is not None:
            same = checker.check_output(expected, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            assert same, f"expected\n{expected}\nfound\n{printed}"


# -- commands ----------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """Simple commands of fenced bash, of indented lines and of inline code that name one of this project's programs."""
    text = text_of(page)
    lines = "".join(block[2] for block in FENCED.finditer(text) if block[1] == "bash")
    rest = FENCED.sub("", text)
    ours = r"(?:(?:mixencoder|pytest|pip|torchrun) |python -m (?:mix|bench))"
    # a line that ends in a backslash goes on
    indented = re.findall(rf"^    (?:    )?({ours}(?:.*\\\n)*.*)$", rest, flags=re.M)
    inline = [code for code in map(" ".join, map(str.split, re.findall(r"`([^`]+)`", rest))) if re.match(ours, code)]
    for line in [*lines.replace("\\\n", " ").splitlines(), *indented, *inline]:
        yield from simple_commands(line.replace("\\\n", " "))


def simple_commands(line: str) -> Iterator[list[str]]:
    """Split a line at ``&&``, ``;`` and pipes, without variables that are set before a command."""
    # a comment's apostrophe is no quote; what a command substitutes is an argument
    lexer = shlex.shlex(re.sub(r"(^|\s)#.*", "", line).replace("$(", "("), posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    command: list[str] = []
    for token in [*lexer, ";"]:
        if set(token) <= set(";&|"):
            if command:
                yield command
            command = []
        elif command or not re.match(r"\w+=", token):
            command.append(token)


def flags(arguments: list[str]) -> list[str]:
    return [argument.partition("=")[0] for argument in arguments if re.match(r"--?[a-zA-Z]", argument)]


def check_mixencoder(arguments: list[str]) -> None:
    command = get_command(app)
    while arguments and hasattr(command, "commands"):
        assert arguments[0] in command.commands, f"no command {arguments[0]!r} in {sorted(command.commands)}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert set(flags(arguments)) <= known, f"{command.name} has no {set(flags(arguments)) - known}"


def check_module(module: str, arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch) -> None:
    """A module with an argument parser of its own: its help names every flag."""
    assert importlib.util.find_spec(module), f"no module {module}"
    if not flags(arguments):
        return
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module(module, run_name="__main__")
    missing = set(flags(arguments)) - set(re.findall(r"--?[a-zA-Z][\w-]*", capsys.readouterr().out))
    assert not missing, f"{module} has no {missing}"


def check_extras(arguments: list[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extras in re.findall(r"(?:\.|mixencoder)\[([\w,]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= set(known), f"extras are {sorted(known)}"


def named_files(arguments: list[str]) -> list[str]:
    """What an argument names in this repository, with its ending."""
    folder = r"(docs|tests|benchmarks|mixencoder|mixkernels)/"
    return [argument for argument in arguments if re.match(folder + r"[^*]*\.\w+$", argument)]


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=name)
def test_commands_and_their_flags_and_files_exist(page, capsys, monkeypatch):
    for command in commands(page):
        program, arguments = command[0].removeprefix(".venv/bin/"), command[1:]
        missing = [file for file in named_files(arguments) if not (ROOT / file).is_file()]
        assert not missing, f"{' '.join(command)}: there is no {missing}"
        if "-m" in arguments and program in MODULE_RUNNERS:
            # python, and what runs a module under something else
            program, *arguments = arguments[arguments.index("-m") + 1 :]
        if program == "mixencoder":
            check_mixencoder([argument for argument in arguments if argument != "..."])
        elif re.match(r"(mixkernels|benchmarks)\b", program):
            check_module(program, arguments, capsys, monkeypatch)
        elif program == "pip":
            check_extras(arguments)
        else:
            assert program in OTHER_PROGRAMS, f"{' '.join(command)}: {program} is no program that these pages use"
