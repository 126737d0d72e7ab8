"""The layers of the three packages, read off their imports, and the picture of them in docs/design.md.

A unit is a file or a folder directly inside a package. The order of layers is written down in docs/design.md; the test
tests/project/test_layers.py compares the imports with it.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.measuring.provenance import ROOT

PACKAGES = ("mixencoder", "mixkernels", "benchmarks")
PICTURE = ROOT / "docs" / "images" / "layers.svg"
_DESIGN = ROOT / "docs" / "design.md"


def modules(package: str, root: Path = ROOT) -> dict[str, Path]:
    """Return the modules of a package, by dotted name."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: Iterable[str]) -> list[tuple[str, str]]:
    """Return what a file imports of known modules, at its top or inside functions: (module, name); "" for no name.

    Imports for type checkers alone (``if TYPE_CHECKING``) are left out.
    """
    known, found = set(known), []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {id(inner) for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name in known]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    found.append((inner, ""))
                elif node.module in known:
                    found.append((node.module, alias.name))
    return found


def import_graph(package: str, root: Path = ROOT) -> dict[str, set[str]]:
    """Return the modules of a package, each with the modules of the package that it imports."""
    known = modules(package, root)
    return {name: {target for target, _ in imports_of(path, known)} - {name} for name, path in known.items()}


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the names that stand on a circle of imports, sorted."""
    left = {name: {target for target in targets if target in graph} for name, targets in graph.items()}
    # take away what imports nothing that is left, then what nothing imports
    for _ in range(2):
        while ends := {name for name, targets in left.items() if not targets}:
            left = {name: targets - ends for name, targets in left.items() if name not in ends}
        left = {name: {other for other in left if name in left[other]} for name in left}
    return sorted(left)


def unit_of(module: str) -> str:
    """Return the file or folder directly inside a package that a module belongs to; the package itself for its root."""
    return module.split(".")[1] if "." in module else module


def unit_graph(package: str, root: Path = ROOT) -> dict[str, set[str]]:
    """Return the units of a package, each with the other units that it imports."""
    graph: dict[str, set[str]] = {}
    for module, targets in import_graph(package, root).items():
        unit = unit_of(module)
        graph.setdefault(unit, set()).update({unit_of(target) for target in targets} - {unit})
    return graph


def documented_layers() -> dict[str, list[tuple[str, ...]]]:
    """Return the layers of each package from the top down, as the table of docs/design.md has them."""
    found = {}
    for line in _DESIGN.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\| `(\w+)` \| (`.*`) \|", line):
            layers = match.group(2).split(" > ")
            found[match.group(1)] = [tuple(re.findall(r"`(\w+)`", layer)) for layer in layers]
    return found


def purpose(package: str, unit: str) -> str:
    """Return the first sentence of a unit's docstring, without marks."""
    path = ROOT / package / unit
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=[.!?])\s|\n\n|: ``", text, maxsplit=1)[0]
    return " ".join(sentence.replace("`", "").split()).rstrip(".:")


def picture_data() -> dict[str, list[list[tuple[str, str]]]]:
    """Return what the picture shows: for each package its layers from the top down, (unit, purpose) each."""
    return {
        package: [[(unit, purpose(package, unit)) for unit in layer] for layer in layers]
        for package, layers in documented_layers().items()
    }


def digest() -> str:
    """Return the digest of what the picture shows."""
    return hashlib.sha256(json.dumps(picture_data(), sort_keys=True).encode()).hexdigest()


def is_current() -> bool:
    """Whether the committed picture shows the layers as they are."""
    return PICTURE.exists() and digest() in PICTURE.read_text(encoding="utf-8")


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
