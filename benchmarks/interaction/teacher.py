"""Encode the training texts with a larger encoder, whose cosines teach the interaction.

``python -m benchmarks.interaction.teacher --features FEATURES --encoder MPNET``. Writes teacher.NAME.pt beside each
training source: unit vectors of queries and of documents, float16. The sources that are done are kept.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.interaction.encodings import Lists
from benchmarks.interaction.features import FrozenEncoder
from mixencoder.durable import replacing


def unit_vectors(encoder: FrozenEncoder, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean token vector of every text, scaled to length 1: (N, d) float16."""
    found = torch.empty(len(rows), encoder.model.config.hidden_size, dtype=torch.float16)

    def keep(number: int, states: list[Tensor]) -> None:
        found[number] = F.normalize(states[-1].mean(dim=0), dim=0)

    encoder.passes(rows, keep)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interaction.teacher", description=__doc__)
    parser.add_argument("--features", type=Path, required=True, help="folder that `features` wrote")
    parser.add_argument("--encoder", required=True, help="the larger encoder, for example all-mpnet-base-v2")
    options = parser.parse_args()
    encoder = FrozenEncoder(options.encoder)
    for path in sorted(options.features.glob("*.pt"), key=lambda path: path.stat().st_size):
        output = path.with_name(f"teacher.{path.name}")
        if path.name.startswith("teacher.") or output.is_file():
            continue
        lists: Lists = torch.load(path, weights_only=False)
        assert lists.texts is not None, "features keep the texts"
        queries, documents = lists.texts
        vectors = (
            unit_vectors(encoder, encoder.read_query(queries)),
            unit_vectors(encoder, encoder.read_document(documents)),
        )
        with replacing(output) as temporary:
            torch.save(vectors, temporary)
        print(f"{path.stem}: {len(queries)} queries, {len(documents)} documents", flush=True)


if __name__ == "__main__":
    main()
