"""Imports run one way: no circle, none against the layers of docs/design.md, nothing private; no file is too long."""

from pathlib import Path

import pytest

from benchmarks.measuring.provenance import ROOT
from benchmarks.report import layers

LONGEST_FILE = 500


@pytest.mark.parametrize("package", layers.PACKAGES)
def test_imports_make_no_circle(package):
    assert layers.circles(layers.import_graph(package)) == []
    assert layers.circles(layers.unit_graph(package)) == []


@pytest.mark.parametrize("package", layers.PACKAGES)
def test_units_import_only_from_layers_below(package):
    graph = layers.unit_graph(package)
    floors = {
        unit: floor for floor, units in enumerate(reversed(layers.documented_layers()[package])) for unit in units
    }
    # the package's own file binds public names on first use
    graph.pop(package)
    assert set(floors) == set(graph)
    wrong = [
        f"{unit} imports {target}"
        for unit in graph
        for target in graph[unit] - {package}
        if floors[target] >= floors[unit]
    ]
    assert wrong == []


def test_mixkernels_knows_no_mixencoder_and_neither_knows_the_benchmarks():
    packages = {package: layers.modules(package) for package in layers.PACKAGES}
    allowed = {"mixkernels": {"mixkernels"}, "mixencoder": {"mixencoder", "mixkernels"}}
    for package, known in allowed.items():
        others = {module for other in packages if other not in known for module in packages[other]}
        assert [path for path in packages[package].values() if layers.imports_of(path, others)] == []


def test_no_unit_imports_a_private_name_of_another():
    everything = {name: path for package in layers.PACKAGES for name, path in layers.modules(package).items()}
    private = [
        f"{importer}: {target} {name}"
        for importer, path in everything.items()
        for target, name in layers.imports_of(path, everything)
        if importer.split(".")[:2] != target.split(".")[:2]
        and any(part.startswith("_") and not part.endswith("__") for part in [*target.split("."), name])
    ]
    assert private == []


def test_no_file_is_longer_than_the_limit():
    files = [path for folder in (*layers.PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py")]
    long = {path.name: count for path in files if (count := len(path.read_text("utf-8").splitlines())) > LONGEST_FILE}
    assert long == {}


def test_the_picture_shows_the_layers_as_they_are():
    # `python -m benchmarks.report` draws it anew
    assert layers.is_current()


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_circle_is_found_wherever_its_imports_stand(tmp_path):
    files = {
        "package/__init__.py": "",
        "package/low.py": "def late():\n    from package.upper.high import thing\n",
        "package/upper/__init__.py": "",
        "package/upper/high.py": "import package.middle\n",
        "package/middle.py": "from package import low\n",
        "package/apart.py": "import package.upper.high\n",
    }
    graph = layers.import_graph("package", written(tmp_path, files))
    assert layers.circles(graph) == ["package.low", "package.middle", "package.upper.high"]
    assert layers.circles(layers.unit_graph("package", tmp_path)) == ["low", "middle", "upper"]
    opened = written(tmp_path, {"package/low.py": "if TYPE_CHECKING:\n    from package.upper.high import thing\n"})
    assert layers.circles(layers.import_graph("package", opened)) == []
