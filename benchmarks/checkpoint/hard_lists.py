"""Mine hard negatives for the second stage: ``python -m benchmarks.checkpoint.hard_lists --data-dir DATA --free FREE``.

Draws pairs of every source, and for each the wrong documents of that source with the highest dual term of a trained
model, without the very first, which may be right. Writes FREE/hard/NAME.jsonl.gz.
"""

import argparse
import random
from pathlib import Path

from mixencoder import MixEncoder
from mixencoder.data.examples import read_source
from mixencoder.training.mining import mine_negatives, write_candidate_lists

SEED = 0
NEGATIVES, SKIP = 4, 1
MAX_QUERY_TOKENS, MAX_DOCUMENT_TOKENS = 48, 64

SOURCES = {
    "dialogue/ubuntu_irc.train.jsonl.gz": 5000,
    "answers/medquad.train.jsonl.gz": 2500,
    "packages.jsonl.gz": 3500,
    "wordnet.jsonl.gz": 3000,
    "qnli.jsonl.gz": 2848,
}
"""File in DATA or FREE -> pairs drawn."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint.hard_lists", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data")
    parser.add_argument("--free", type=Path, required=True, help="folder that free_pairs wrote")
    parser.add_argument("--model", help="checkpoint whose scores are used (default: the bundled one)")
    options = parser.parse_args()
    limits = {"max_query_length": MAX_QUERY_TOKENS, "max_document_length": MAX_DOCUMENT_TOKENS}
    engine = MixEncoder.from_pretrained(options.model).with_limits(**limits)
    (options.free / "hard").mkdir(exist_ok=True)
    for name, count in SOURCES.items():
        path = (options.data_dir if "/" in name else options.free) / name
        source = read_source(path)
        source.examples[:] = random.Random(SEED).sample(source.examples, count)
        mined = mine_negatives(
            engine,
            source,
            negatives=NEGATIVES,
            skip=SKIP,
            margin=0.0,
            score="dual",
            batch_size=64,
            show_progress_bar=False,
        )
        write_candidate_lists(mined, options.free / "hard" / path.name)
        print(
            f"{path.name}: {sum(len(example.negatives) for example in mined)} negatives for {count} queries", flush=True
        )


if __name__ == "__main__":
    main()
