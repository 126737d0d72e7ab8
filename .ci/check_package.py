"""Check what an sdist and a wheel hold: ``check_package.py SDIST WHEEL``. Called by ``.ci/package``."""

import sys
import tarfile
import zipfile

NEEDED = {
    "mixencoder/py.typed",
    "mixkernels/py.typed",
    "mixencoder/cli/demo.txt",
    "mixencoder/integrations/__init__.py",
    "mixencoder/pretrained/README.md",
    "mixencoder/pretrained/config.json",
    "mixencoder/pretrained/model.safetensors",
    "mixencoder/pretrained/tokenizer.json",
}


def main() -> None:
    """Exit with a message if something is missing, or does not belong there."""
    sdist, wheel = sys.argv[1:]
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    inside = {name for name in names if ".dist-info/" not in name}
    wrong = sorted(name for name in inside if name.partition("/")[0] not in ("mixencoder", "mixkernels"))
    licences = [name for name in names - inside if name.endswith("/licenses/LICENSE")]
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    missing = sorted((NEEDED - inside) | ({*NEEDED, "pyproject.toml", "README.md", "LICENSE"} - packed))
    if wrong or missing or not licences or any("__pycache__" in name for name in names):
        sys.exit(f"the wheel should not hold {wrong}; missing: {missing}; licences: {licences}")


main()
