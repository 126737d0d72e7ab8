"""``python -m benchmarks.report [--check]``: render README, docs and model card from benchmarks/results.

Pictures need the extra ``plots``. With --check nothing is written; exit code 1 means that something differs.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from benchmarks.report import layers
from benchmarks.report.documents import documents, rendered
from benchmarks.report.pictures import PICTURES, is_current, picture_path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 1 if something differs (with --check) or could not be drawn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, list what differs")
    options = parser.parse_args(arguments)
    stale = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if (new := rendered(text, path.parent)) != text:
            stale.append(path)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    outdated = [name for name in PICTURES if not is_current(name)]
    pictures = [*map(picture_path, outdated), *([] if layers.is_current() else [layers.PICTURE])]
    for path in [*stale, *pictures]:
        print(f"{'differs' if options.check else 'written'}: {path.name}")
    if options.check:
        return int(bool(stale or pictures))
    if pictures and importlib.util.find_spec("matplotlib") is None:
        names = ", ".join(path.name for path in pictures)
        print(f"not drawn: {names}; pictures need matplotlib: pip install 'mixencoder[plots]'")
        return 1
    for name in outdated:
        from benchmarks.report.drawing import draw

        picture = PICTURES[name]()
        if picture is None:
            picture_path(name).unlink()
        else:
            draw(picture, picture_path(name))
    if layers.PICTURE in pictures:
        from benchmarks.report.layers_drawing import draw as draw_layers

        draw_layers()
    return 0


if __name__ == "__main__":
    sys.exit(main())
