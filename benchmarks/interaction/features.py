"""Encode training and development texts with a frozen encoder.

``python -m benchmarks.interaction.features --data-dir DATA --backbone MINILM --output FEATURES``. DATA holds the public
files and free/ (`benchmarks.checkpoint.free_pairs`). Writes one file for each source and development set; those that
exist are kept, so an interrupted run resumes.
"""

import argparse
import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from benchmarks.checkpoint.share import pool_task
from benchmarks.interaction.encodings import Documents, Lists, Queries
from mixencoder.base.tokenization import TextEncoder, pad
from mixencoder.data.answers import right_documents, with_known_answers
from mixencoder.data.examples import read_source
from mixencoder.durable import replacing
from mixencoder.evaluation.tasks import RankingTask, read_tasks

MAX_QUERY_TOKENS, MAX_DOCUMENT_TOKENS = 56, 128
SPANS = (4, 8)
CODES = 4
MINED, SKIPPED = 16, 1
"""Negatives kept for each query, and how many of the most similar wrong documents are skipped: they may be right."""
SEED = 0

SOURCES = {
    "dialogue/ubuntu_irc.train.jsonl.gz": 8000,
    "answers/medquad.train.jsonl.gz": 5000,
    "free/packages.jsonl.gz": 8000,
    "free/wordnet.jsonl.gz": 5000,
    "free/qnli.jsonl.gz": 2848,
    "rerank/scifact": 809,
    "answers/selqa.train.jsonl.gz": 1590,
    "answers/trecqa.train.jsonl.gz": 93,
}
"""Training source -> most queries."""
LISTED = 12
"""Most wrong documents kept of a query's own list."""

POOLS = {"foldoc": "free/foldoc.jsonl.gz", "quora": "pairs/quora.dev.jsonl.gz"}
LISTS = {
    "wikiqa.dev": "answers/wikiqa.dev.jsonl.gz",
    "wikiqa.test": "answers/wikiqa.test.jsonl.gz",
    "mutual": "dialogue/mutual.dev.jsonl.gz",
    "dailydialogpp": "dialogue/dailydialogpp.dev.jsonl.gz",
    "ubuntu_1in10": "dialogue/ubuntu_irc_1in10.dev.jsonl.gz",
    "trecqa": "answers/trecqa.dev.jsonl.gz",
    "scifact": "rerank/scifact",
}
UNSEEN = ("foldoc", "quora", "wikiqa.dev", "wikiqa.test", "mutual", "dailydialogpp")
"""Development sets whose domain no source covers."""
DEV_QUERIES = 300


class FrozenEncoder:
    """An encoder that runs in bfloat16, with its tokenizer."""

    def __init__(self, path: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path).eval()
        self.read_query = TextEncoder(
            tokenizer, max_length=MAX_QUERY_TOKENS, truncation_side="left", role="query", notices=None
        )
        self.read_document = TextEncoder(tokenizer, max_length=MAX_DOCUMENT_TOKENS, notices=None)
        self.pad_id = tokenizer.pad_token_id

    def passes(self, rows: Sequence[Sequence[int]], keep: Callable[[int, list[Tensor]], None], size: int = 64) -> None:
        """Call keep(number, hidden states of every layer (n, d)) for every text."""
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            ids, mask = pad([rows[number] for number in part], self.pad_id)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                states = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            for row, number in enumerate(part):
                keep(number, [state[row, : len(rows[number])].float() for state in states])


def encode_queries(encoder: FrozenEncoder, texts: Sequence[str]) -> Queries:
    """Encode queries."""
    rows = encoder.read_query(list(texts))
    means, kept = torch.empty(len(rows), encoder.model.config.hidden_size, dtype=torch.float16), {}

    def keep(number: int, states: list[Tensor]) -> None:
        means[number] = states[-1].mean(dim=0)
        kept[number] = (states[-2].half(), states[-3].half())

    encoder.passes(rows, keep)
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    tokens = {
        layer: torch.cat([kept[number][place] for number in range(len(rows))]) for place, layer in ((0, -1), (1, -2))
    }
    return Queries(means, tokens, offsets)


def encode_documents(encoder: FrozenEncoder, texts: Sequence[str], codes: dict[str, Tensor]) -> Documents:
    """Encode documents in every form; codes are {name: (k, d)}, applied as ``softmax(C T^T) T``."""
    rows = encoder.read_document(list(texts))
    d = encoder.model.config.hidden_size
    forms = {"mean": torch.empty(len(rows), 1, d, dtype=torch.float16)}
    forms |= {f"spans-{count}": torch.empty(len(rows), count, d, dtype=torch.float16) for count in SPANS}
    forms |= {name: torch.empty(len(rows), len(code), d, dtype=torch.float16) for name, code in codes.items()}

    def keep(number: int, states: list[Tensor]) -> None:
        tokens = states[-1]
        forms["mean"][number, 0] = tokens.mean(dim=0)
        for count in SPANS:
            forms[f"spans-{count}"][number] = span_means(tokens, count)
        for name, code in codes.items():
            forms[name][number] = (code @ tokens.T).softmax(dim=-1) @ tokens

    encoder.passes(rows, keep)
    return Documents(forms)


def span_means(tokens: Tensor, count: int) -> Tensor:
    """Mean token vectors of `count` equal spans of a text (n, d); a text with fewer tokens repeats some."""
    n = len(tokens)
    bounds = [(number * n // count, max((number + 1) * n // count, number * n // count + 1)) for number in range(count)]
    return torch.stack([tokens[first:last].mean(dim=0) for first, last in bounds])


def starting_codes(encoder: FrozenEncoder, texts: Sequence[str]) -> dict[str, Tensor]:
    """Random codes as published, and principal directions of token vectors, scaled to prefer some tokens."""
    vectors: list[Tensor] = []
    encoder.passes(encoder.read_document(list(texts)), lambda _, states: vectors.append(states[-1]))
    tokens = torch.cat(vectors)
    centred = tokens - tokens.mean(dim=0)
    _, _, directions = torch.pca_lowrank(centred, q=CODES, niter=4)
    # a softmax over tokens that prefers those far out in this direction, without taking one alone
    scale = 2.0 / (centred @ directions).std(dim=0)
    generator = torch.Generator().manual_seed(SEED)
    return {
        f"codes-{CODES}": torch.randn(CODES, tokens.shape[1], generator=generator),
        f"directions-{CODES}": directions.T * scale.unsqueeze(1),
    }


def source_lists(encoder: FrozenEncoder, path: Path, most: int, codes: dict[str, Tensor]) -> Lists:
    """Encode a training source, and find its most similar wrong documents."""
    source = with_known_answers([read_source(path)])[0]
    chance = random.Random(SEED)
    examples = chance.sample(source.examples, min(most, len(source.examples)))
    numbers: dict[str, int] = {}
    candidates, grades = [], []
    for example in examples:
        wrong = chance.sample(example.negatives, min(LISTED, len(example.negatives)))
        texts = [*example.positives[:3], *wrong]
        candidates.append([numbers.setdefault(text, len(numbers)) for text in texts])
        grades.append([1] * len(example.positives[:3]) + [0] * len(wrong))
    queries = encode_queries(encoder, [example.query for example in examples])
    documents = encode_documents(encoder, list(numbers), codes)
    right = right_documents(examples)
    known = [
        {numbers[text] for text in right[example.query.strip()] if text in numbers}
        | {number for number, grade in zip(listed, marks, strict=True) if grade}
        for example, listed, marks in zip(examples, candidates, grades, strict=True)
    ]
    mined = similar_documents(queries.mean, documents.forms["mean"][:, 0], known)
    return Lists(queries, documents, candidates, grades, mined, ([e.query for e in examples], list(numbers)))


def similar_documents(queries: Tensor, documents: Tensor, known: Sequence[set[int]]) -> Tensor:
    """Return for every query the most similar documents that are not known to be right: (B, MINED) int64."""
    q, c = (torch.nn.functional.normalize(vectors.float(), dim=-1) for vectors in (queries, documents))
    found = []
    wanted = MINED + SKIPPED
    for row in range(len(q)):
        best = (c @ q[row]).topk(min(wanted + len(known[row]), len(c))).indices.tolist()
        wrong = [number for number in best if number not in known[row]][SKIPPED:wanted]
        if not wrong:
            raise ValueError(
                f"query {row} has no wrong document; expected a source of at least {SKIPPED + 2} documents"
            )
        found.append((wrong * MINED)[:MINED])
    return torch.tensor(found)


def task_lists(encoder: FrozenEncoder, task: RankingTask, codes: dict[str, Tensor]) -> Lists:
    """Encode a development set."""
    used = sorted({number for listed in task.candidates for number in listed})
    place = {number: position for position, number in enumerate(used)}
    texts = [task.documents[number] for number in used]
    return Lists(
        encode_queries(encoder, task.queries),
        encode_documents(encoder, texts, codes),
        [[place[number] for number in listed] for listed in task.candidates],
        [[qrels.get(name, 0) for name in names] for names, qrels in zip(task.document_ids, task.qrels, strict=True)],
        texts=(list(task.queries), texts),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interaction.features", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data, and free/")
    parser.add_argument("--backbone", required=True, help="the frozen encoder")
    parser.add_argument("--output", type=Path, required=True, help="folder for the encodings")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    encoder = FrozenEncoder(options.backbone)
    with gzip.open(options.data_dir / "free/packages.jsonl.gz", "rt", encoding="utf-8") as file:
        sample = [json.loads(line)["positive"] for _, line in zip(range(2000), file, strict=False)]
    codes = starting_codes(encoder, sample)

    def write(name: str, make: Callable[[], Lists]) -> None:
        path = options.output / f"{name}.pt"
        if not path.is_file():
            made = make()
            with replacing(path) as temporary:
                torch.save(made, temporary)
            print(f"{name}: {len(made.candidates)} queries, {len(made.documents.forms['mean'])} documents", flush=True)

    for name, path in POOLS.items():
        write(f"dev.{name}", lambda path=path: task_lists(encoder, pool_task(options.data_dir / path), codes))
    for name, path in LISTS.items():
        tasks = [options.data_dir / path]
        write(
            f"dev.{name}",
            lambda tasks=tasks: task_lists(encoder, read_tasks(tasks, limit=DEV_QUERIES, sample=SEED)[0], codes),
        )
    for name, most in SOURCES.items():
        short = Path(name).name.partition(".")[0]
        write(
            f"train.{short}", lambda name=name, most=most: source_lists(encoder, options.data_dir / name, most, codes)
        )


if __name__ == "__main__":
    main()
