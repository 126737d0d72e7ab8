"""Training data: files of pairs, candidate lists, labelled and scored pairs, and batches drawn from them.

A file's shape is read off its fields (the table is in docs/training.md). Every file is checked whole before training
starts. A batch comes from one file, so that its in-batch negatives are of one kind.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mixencoder.beir import read_beir
from mixencoder.errors import DataError
from mixencoder.jsonlines import read_json_lines
from mixencoder.tokenization import TextEncoder, pad

logger = logging.getLogger(__name__)


class Example(NamedTuple):
    """One training example of any task."""

    query: str
    positives: tuple[str, ...]
    """The right documents; for labelled and scored pairs the one document."""
    negatives: tuple[str, ...] = ()
    """Listed wrong documents."""
    target: float = 0.0
    """Class number or similarity score; unused for ranking."""


@dataclass(frozen=True)
class Source:
    """One data file, or one BEIR folder, checked and in memory."""

    name: str
    task: str
    """"ranking", "classification" or "similarity"."""
    examples: list[Example]
    weight: float = 1.0
    """How often batches come from here, relative to the other sources."""


_SHAPES: dict[str, tuple[str, ...]] = {
    "pair": ("query", "positive"),
    "multi": ("query", "positives"),
    "rank": ("query", "candidates", "labels"),
    "nli": ("premise", "hypothesis", "label"),
    "sts": ("sentence1", "sentence2", "score"),
}


def read_source(path: Path, *, weight: float = 1.0, label2id: dict[str, int] | None = None) -> Source:
    """Read and check a data file (.jsonl or .jsonl.gz) or a folder in BEIR layout (its train split).

    Args:
        path: the file or folder.
        weight: see `Source`.
        label2id: class names of the classification head; None if the model has none.

    Raises:
        DataError: the file cannot be read, a line has the wrong shape, or nothing usable is in it. The message names
            file, line, found and expected fields.
    """
    if path.is_dir():
        return Source(path.name, "ranking", _read_beir_examples(path), weight)
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder")
    examples: list[Example] = []
    shape, dropped = None, 0
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        if shape is None:
            shape = next((name for name, fields in _SHAPES.items() if set(fields) <= set(row)), None)
        if shape is None or not set(_SHAPES[shape]) <= set(row):
            expected = " or ".join(", ".join(fields) for fields in ([_SHAPES[shape]] if shape else _SHAPES.values()))
            raise DataError(f"{where}: fields are {', '.join(row)}; expected {expected}")
        example = _READERS[shape](row, where, label2id)
        if example is None:
            dropped += 1
        else:
            examples.append(example)
    if dropped:
        logger.warning(
            "%s: %d of %d rows have no right candidate and are left out", path, dropped, dropped + len(examples)
        )
    if not examples:
        raise DataError(f"{path} holds no usable example")
    task = {"nli": "classification", "sts": "similarity"}.get(shape, "ranking")
    return Source(path.name.removesuffix(".gz").removesuffix(".jsonl"), task, examples, weight)


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is a {type(value).__name__}; expected a string")
    return value


def _texts(value: Any, where: str, field: str) -> list[str]:
    if not isinstance(value, list):
        raise DataError(f"{where}: {field} is a {type(value).__name__}; expected a list of strings")
    return [_text(text, where, field) for text in value]


def _read_pair(row: dict, where: str, _: Any) -> Example | None:
    return _ranking(_text(row["query"], where, "query"), [_text(row["positive"], where, "positive")], [])


def _read_multi(row: dict, where: str, _: Any) -> Example | None:
    return _ranking(_text(row["query"], where, "query"), _texts(row["positives"], where, "positives"), [])


def read_ranking_rows(path: Path) -> Iterator[tuple[str, list[str], list[float]]]:
    """Yield (query, candidates, labels) of a rank file.

    Raises:
        DataError: a line has another shape; the message names file and line.
    """
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        if not set(_SHAPES["rank"]) <= set(row):
            raise DataError(f"{where}: fields are {', '.join(row)}; expected {', '.join(_SHAPES['rank'])}")
        yield _text(row["query"], where, "query"), *_candidates_and_labels(row, where)


def _candidates_and_labels(row: dict, where: str) -> tuple[list[str], list[float]]:
    candidates, labels = _texts(row["candidates"], where, "candidates"), row["labels"]
    if not isinstance(labels, list) or not all(isinstance(label, int | float) for label in labels):
        raise DataError(f"{where}: labels are {labels!r}; expected a list of numbers")
    if len(candidates) != len(labels):
        raise DataError(f"{where}: {len(candidates)} candidates but {len(labels)} labels")
    return candidates, labels


def _read_rank(row: dict, where: str, _: Any) -> Example | None:
    candidates, labels = _candidates_and_labels(row, where)
    right = [text for text, label in zip(candidates, labels, strict=True) if label > 0]
    wrong = [text for text, label in zip(candidates, labels, strict=True) if label <= 0]
    return _ranking(_text(row["query"], where, "query"), right, wrong)


def _read_nli(row: dict, where: str, label2id: dict[str, int] | None) -> Example:
    label = row["label"]
    if label2id is None:
        raise DataError(f"{where}: labelled pairs need a classification head, which this model lacks (--heads)")
    if label not in label2id:
        raise DataError(f"{where}: label is {label!r}; expected one of {', '.join(label2id)}")
    pair = (_text(row["premise"], where, "premise"), _text(row["hypothesis"], where, "hypothesis"))
    return Example(pair[0], (pair[1],), target=label2id[label])


def _read_sts(row: dict, where: str, _: Any) -> Example:
    score = row["score"]
    if not isinstance(score, int | float) or score != score:
        raise DataError(f"{where}: score is {score!r}; expected a number")
    pair = (_text(row["sentence1"], where, "sentence1"), _text(row["sentence2"], where, "sentence2"))
    return Example(pair[0], (pair[1],), target=float(score))


_READERS: dict[str, Callable[[dict, str, dict[str, int] | None], Example | None]] = {
    "pair": _read_pair,
    "multi": _read_multi,
    "rank": _read_rank,
    "nli": _read_nli,
    "sts": _read_sts,
}


def _ranking(query: str, right: Sequence[str], wrong: Sequence[str]) -> Example | None:
    """Build a ranking example; None without a query or a right document. Blank documents are no documents."""
    right, wrong = tuple(filter(str.strip, right)), tuple(filter(str.strip, wrong))
    return Example(query, right, wrong) if query.strip() and right else None


def _read_beir_examples(folder: Path) -> list[Example]:
    """Judged documents are right, the first stage's other documents are listed wrong ones."""
    split = read_beir(folder, "train")
    examples = []
    for query, grades in split.qrels.items():
        right = [split.corpus[document] for document, grade in grades.items() if grade > 0 and document in split.corpus]
        wrong = [split.corpus[document] for document in split.run.get(query, ()) if grades.get(document, 0) <= 0]
        example = _ranking(split.queries[query], right, wrong)
        if example is not None:
            examples.append(example)
    if not examples:
        raise DataError(f"{folder} holds no judged training query")
    return examples


class ExampleDataset(Dataset):
    """All examples of all sources in one row of numbers, each with its task."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._items = [(source.task, example) for source in sources for example in source.examples]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[str, Example]:
        """Return (task, example)."""
        return self._items[index]


class SourceBatchSampler(Sampler[list[int]]):
    """Batches of example numbers, each from one source, drawn with a seed.

    Sources take turns at random by their weight. Within a source every example comes once before any comes twice, and
    a batch holds texts of like length, which saves padding.

    Args:
        sources: in the order of the `ExampleDataset`.
        batch_size: examples a batch; a smaller source gives smaller batches.
        steps: number of batches.
        seed: of everything random here.
    """

    _WINDOW = 32
    """Batches sorted by length at once: enough to save padding, few enough to stay random."""

    def __init__(self, sources: Sequence[Source], *, batch_size: int, steps: int, seed: int) -> None:
        super().__init__()
        self._sources = sources
        self._batch_size = batch_size
        self._steps = steps
        self._seed = seed

    def __len__(self) -> int:
        """Return the number of batches."""
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches; the same ones every time."""
        chance = random.Random(self._seed)
        offsets, streams = 0, []
        for source in self._sources:
            streams.append(self._batches(source, offsets, random.Random(f"{self._seed} {source.name}")))
            offsets += len(source.examples)
        weights = [source.weight for source in self._sources]
        for _ in range(self._steps):
            yield next(chance.choices(streams, weights)[0])

    def _batches(self, source: Source, offset: int, chance: random.Random) -> Iterator[list[int]]:
        size = min(self._batch_size, len(source.examples))
        width = [len(example.query) + len(example.positives[0]) for example in source.examples]
        while True:
            order = list(range(len(source.examples)))
            chance.shuffle(order)
            for start in range(0, len(order), size * self._WINDOW):
                window = sorted(order[start : start + size * self._WINDOW], key=width.__getitem__)
                batches = [window[i : i + size] for i in range(0, len(window) - size + 1, size)]
                chance.shuffle(batches)
                yield from ([offset + index for index in batch] for batch in batches)


@dataclass(frozen=True)
class Collator:
    """Turns examples of one task into tensors for `MixEncoderModel.forward` and a loss.

    Args:
        read_query, read_document: tokenise and cut.
        pad_id: the tokenizer's.
        negatives: listed negatives drawn for each query, where its example lists any.
        seed: of the draws.
    """

    read_query: TextEncoder
    read_document: TextEncoder
    pad_id: int
    negatives: int
    seed: int

    def __call__(self, items: Sequence[tuple[str, Example]]) -> dict[str, Any]:
        """Return the model's inputs, "task", "targets" and, for ranking, "excluded".

        For ranking, documents are one right document of every query and then the drawn negatives, all of which every
        query meets; targets (B,) say which is right, excluded (B, N) marks further right documents, which are no
        negatives.
        """
        tasks = {task for task, _ in items}
        (task,) = tasks
        examples = [example for _, example in items]
        # the draw depends on the examples alone, not on how many batches came before
        chance = random.Random(f"{self.seed} {examples[0].query} {len(examples)}")
        batch: dict[str, Any] = {"task": task}
        documents = [chance.choice(example.positives) for example in examples]
        if task == "ranking":
            for example in examples:
                documents += chance.sample(example.negatives, min(self.negatives, len(example.negatives)))
            batch["targets"] = torch.arange(len(examples))
            batch["excluded"] = self._excluded(examples, documents)
        elif task == "classification":
            batch["targets"] = torch.tensor([int(example.target) for example in examples])
        else:
            batch["targets"] = torch.tensor([example.target for example in examples])
        query = pad(self.read_query([example.query for example in examples]), self.pad_id)
        document = pad(self.read_document(documents), self.pad_id)
        batch["query_input_ids"], batch["query_attention_mask"] = query
        batch["document_input_ids"], batch["document_attention_mask"] = document
        return batch

    @staticmethod
    def _excluded(examples: Sequence[Example], documents: Sequence[str]) -> Tensor:
        excluded = torch.zeros(len(examples), len(documents), dtype=torch.bool)
        for row, example in enumerate(examples):
            right = set(example.positives)
            for column, document in enumerate(documents):
                excluded[row, column] = column != row and document in right
        return excluded
