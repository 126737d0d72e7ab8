"""Make text pairs from free sources: ``python -m benchmarks.checkpoint.free_pairs --data-dir DATA --output FOLDER``.

Needs a Debian system with its package lists (``apt-get update``) and ``apt-get download`` of two packages:

- descriptions of Debian's packages, by their maintainers, each under its package's free licence: the query is the
  one-line summary, the positive the long description;
- glosses of WordNet 3.0 (package wordnet-base, WordNet licence): a word and its meaning;
- entries of the Free On-line Dictionary of Computing (package dict-foldoc, GFDL), an unseen domain for development;
- questions of QNLI in DATA (SQuAD, CC BY-SA) with the sentence that answers them.

Writes packages.jsonl.gz, wordnet.jsonl.gz, foldoc.jsonl.gz and qnli.jsonl.gz, rows of query and positive.
"""

import argparse
import gzip
import json
import os
import random
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SEED = 0
MOST = 20_000
"""Most pairs of a source, drawn at random."""
SHORTEST_SUMMARY, SHORTEST_TEXT, LONGEST_TEXT = 3, 12, 120
"""Lengths in words."""
_NOT_TEXT = re.compile(
    r"^(this|the) package (contains|provides|includes|is)|^transitional|dummy package|debug(ging)? symbols"
    r"|development (files|headers)|documentation for|^homepage:",
    re.IGNORECASE,
)
"""Sentences of many packages that say nothing about the subject."""


class Pair(NamedTuple):
    """A query and the text that it should find."""

    query: str
    positive: str


def package_pairs(paragraphs: str) -> Iterator[Pair]:
    """Summary and long description from an apt translation list; of packages with the same description the first."""
    seen: set[str] = set()
    for stanza in paragraphs.split("\n\n"):
        _, mark, text = stanza.partition("Description-en: ")
        if not mark:
            continue
        summary, *lines = text.splitlines()
        first = " ".join(line.strip() for line in _until_blank(lines))
        # "(data files)", "- runtime": one description serves several packages
        summary = re.sub(r"\s*\([^)]*\)$|\s+[-\u2013\u2014]+ \w+( \w+)?$", "", summary).strip()
        words = first.split()
        if first in seen or _NOT_TEXT.search(first) or _NOT_TEXT.search(summary):
            continue
        if len(summary.split()) >= SHORTEST_SUMMARY and len(words) >= SHORTEST_TEXT and summary not in first:
            seen.add(first)
            yield Pair(summary, " ".join(words[:LONGEST_TEXT]))


def wordnet_pairs(lines: Iterable[str]) -> Iterator[Pair]:
    """The first two words of a synset (the second tells senses apart) and its gloss."""
    for line in lines:
        if line.startswith("  "):
            continue
        fields, _, gloss = line.partition(" | ")
        parts = fields.split()
        words = [word.replace("_", " ") for word in parts[4 : 4 + 2 * int(parts[3], 16) : 2]]
        definition = gloss.partition('; "')[0].strip()
        if len(definition.split()) >= 4 and not any(word.lower() in definition.lower() for word in words):
            yield Pair(", ".join(re.sub(r"\([a-z]+\)$", "", word) for word in words[:2]), definition)


def foldoc_pairs(text: str) -> Iterator[Pair]:
    """A term and the first paragraph of its entry."""
    for entry in re.split(r"\n(?=\S)", text):
        term, _, body = entry.partition("\n")
        paragraphs = [" ".join(part.split()) for part in body.split("\n\n")]
        first = next((part for part in paragraphs if len(part.split()) >= SHORTEST_TEXT), None)
        if first is not None and term[0].isalpha():
            plain = re.sub(r"[{}]|<[a-z, /]+>\s*", "", first)
            yield Pair(term.strip(), " ".join(plain.split()[:LONGEST_TEXT]))


def answer_pairs(rows: Iterable[dict[str, str]]) -> Iterator[Pair]:
    """Questions of QNLI and the sentence that answers each."""
    for row in rows:
        if row["label"] == "entailment":
            yield Pair(row["premise"], row["hypothesis"])


def write_pairs(pairs: Iterable[Pair], path: Path) -> int:
    """Write at most `MOST` of the pairs with distinct queries, and return how many."""
    distinct = list({pair.query: pair for pair in pairs}.values())
    random.Random(SEED).shuffle(distinct)
    chosen = distinct[:MOST]
    temporary = path.with_name(f".{path.name}.tmp")
    with gzip.open(temporary, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(pair._asdict(), ensure_ascii=False) + "\n" for pair in chosen)
    os.replace(temporary, path)
    return len(chosen)


def _until_blank(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if line.strip() == ".":
            return
        yield line


def _translations(folder: Path) -> str:
    """The English long descriptions of all packages, which an ordinary ``apt-get update`` may leave out."""
    (folder / "partial").mkdir(parents=True)
    subprocess.run(
        ["apt-get", "update", "-qq", "-o", "Acquire::Languages=en", "-o", f"Dir::State::Lists={folder}"], check=True
    )
    found = [
        subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", path], check=True, capture_output=True, text=True).stdout
        for path in sorted(folder.glob("*Translation-en*"))
    ]
    return "\n\n".join(found)


def _unpacked(folder: Path, *packages: str) -> Path:
    """Unpack packages, without installing them, and return the folder."""
    subprocess.run(["apt-get", "download", "-qq", *packages], check=True, cwd=folder)
    for archive in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, folder / "root"], check=True)
    return folder / "root"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint.free_pairs", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pairs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # apt reads as another user
        folder.chmod(0o755)
        root = _unpacked(folder, "wordnet-base", "dict-foldoc")
        wordnet = (root / "usr/share/wordnet/data.noun").read_text(encoding="utf-8").splitlines()
        with gzip.open(root / "usr/share/dictd/foldoc.dict.dz", "rt", encoding="utf-8") as file:
            foldoc = file.read()
        with gzip.open(options.data_dir / "nli/qnli.train.jsonl.gz", "rt", encoding="utf-8") as file:
            qnli = [json.loads(line) for line in file]
        sources = {
            "packages": package_pairs(_translations(folder / "lists")),
            "wordnet": wordnet_pairs(wordnet),
            "foldoc": foldoc_pairs(foldoc),
            "qnli": answer_pairs(qnli),
        }
        for source, pairs in sources.items():
            count = write_pairs(pairs, options.output / f"{source}.jsonl.gz")
            print(f"{source}: {count} pairs")


if __name__ == "__main__":
    main()
