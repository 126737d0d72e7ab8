"""Public names are bound on first use: what type checkers see, what is listed and what is bound are the same."""

import ast
import importlib
from pathlib import Path

import pytest


def imported_for_type_checkers(path: Path) -> dict[str, str]:
    """Names and the modules they come from, of the imports below ``if TYPE_CHECKING``."""
    (block,) = (
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    return {name.name: line.module for line in block.body for name in line.names}


@pytest.mark.parametrize("package", ["mixencoder", "mixencoder.peers", "mixkernels"])
def test_a_public_name_is_the_same_to_type_checkers_and_at_run_time(package):
    module = importlib.import_module(package)
    homes = {name: f"{package}.{home}" for name, home in module._HOMES.items()}
    assert imported_for_type_checkers(Path(module.__file__)) == homes
    assert set(module.__all__) == set(homes)
    for name, home in homes.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)
