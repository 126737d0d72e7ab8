"""Write `mixkernels` as a repository of kernels that Hugging Face's `kernels` loads: ``kernels_layout.py OUT``.

OUT/build/torch-BACKEND/ holds the whole package for each backend, and metadata.json. Imports are relative, because the
loader imports the package under a name of its own: the metadata's "id", which also names the PyTorch operators. The
profiler's command line stays out. To publish, upload OUT; nothing here contacts a hub.
"""

import ast
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "mixkernels"
BACKENDS = ("cpu", "cuda", "rocm")
VERSION = 1
"""Version of the operators' interface, which the loader asks for; increased by a change that breaks callers."""
LEFT_OUT = ("profile.py",)
"""Command lines, which make no sense inside a loaded kernel."""

CARD = """---
library_name: kernels
license: {license}
tags:
- kernels
---

# {package}

{description}

```python
from kernels import get_local_kernel

{package} = get_local_kernel("OUT")
result = {package}.candidate_attention(query, key, value, state, shared_key, shared_value)
```

Made from {package} {version}. What each operator computes, its arguments and its limits: docs/kernels.md of the source.
"""


def relative_imports(source: str, depth: int, name: str) -> str:
    """Return a module's source with imports of the package made relative.

    Args:
        source: of a module of the package.
        depth: 1 for a module beside the package's ``__init__.py``, one more for each folder.
        name: of the module, for the message.

    Raises:
        SystemExit: "import mixkernels" cannot be made relative.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(found.name.partition(".")[0] == PACKAGE for found in node.names):
            sys.exit(f'{name}:{node.lineno}: "import {PACKAGE}" cannot be relative; use "from {PACKAGE} import ..."')
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            top, _, inner = node.module.partition(".")
            if top == PACKAGE:
                line = lines[node.lineno - 1]
                lines[node.lineno - 1] = line.replace(f"from {node.module} import", f"from {'.' * depth}{inner} import")
    return "".join(lines)


def write_variant(folder: Path, backend: str, project: dict) -> None:
    """Write the package and its metadata for one backend."""
    digest = hashlib.sha256()
    for source in sorted((ROOT / PACKAGE).rglob("*")):
        inner = source.relative_to(ROOT / PACKAGE)
        if source.is_dir() or "__pycache__" in inner.parts or inner.name in LEFT_OUT:
            continue
        target = folder / inner
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".py":
            text = relative_imports(source.read_text(encoding="utf-8"), len(inner.parts), str(inner))
            target.write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(source, target)
        digest.update(f"{inner} {target.stat().st_size}\n".encode() + target.read_bytes())
    metadata = {
        "id": f"{PACKAGE}_{backend}_{digest.hexdigest()[:12]}",
        "name": PACKAGE,
        "version": VERSION,
        "license": project["license"],
        "python-depends": [],
        "backend": {"type": backend},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the folder; it must not exist."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    if out.exists():
        sys.exit(f"{out} exists; expected a new folder")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for backend in BACKENDS:
        write_variant(out / "build" / f"torch-{backend}", backend, project)
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    about = {"description": ast.get_docstring(tree), "package": PACKAGE}
    card = CARD.format(**about, version=project["version"], license=project["license"].lower())
    (out / "README.md").write_text(card, encoding="utf-8")


main()
