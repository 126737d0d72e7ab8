"""Provenance of records, that is versions and commit, and writing of their files."""

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]

Record = dict[str, Any]


def versions() -> dict[str, str]:
    """Versions of the packages and drivers that affect times; those not installed are left out."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or ""}
    for package in ("triton", "flashinfer-python"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    if driver := _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"):
        found["driver"] = driver.splitlines()[0]
    return {name: version for name, version in found.items() if version}


def clocks() -> dict[str, str]:
    """Clocks, power and temperature of the GPU as its driver reports them; empty without nvidia-smi."""
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    found = _output_of("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    values = found.splitlines()[0].split(",") if found else []
    return {name: value.strip() for name, value in zip(names, values, strict=False)}


def commit() -> str:
    """Return the checkout's commit, with "-dirty" if tracked files differ, or "unknown" without a repository."""
    if not (ROOT / ".git").exists() or not (found := _output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")):
        return "unknown"
    changed = _output_of("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return found + ("-dirty" if changed else "")


def _output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()


def slug(name: str) -> str:
    """Turn the name of a device into the name of its folder of results."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document, whole or not at all, with one line for each entry of a list."""
    lines = []
    for key, value in document.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(entry) for entry in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("{\n" + ",\n".join(lines) + "\n}\n")
        Path(name).chmod(0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
