"""Draw batches of examples, each from one source, and turn them into tensors."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, Sampler

from mixencoder.base.tokenization import TextEncoder, pad
from mixencoder.data.answers import right_documents
from mixencoder.data.sources import Example, Source
from mixencoder.errors import InputError


class ExampleDataset(Dataset):
    """The examples of all sources as one list, each with its task."""

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

    The source of every batch is drawn by weight. An epoch of a source holds every example once, in random order, except
    for a remainder of less than a batch. Texts of a batch have similar lengths, which saves padding. All processes draw
    the same batches, and each yields its own part of every batch.

    Args:
        sources: in the order of the `ExampleDataset`.
        batch_size: examples in each process's part of a batch; a smaller source gives smaller batches.
        steps: number of batches.
        seed: of everything random here.
        process, processes: number of this process from 0, and the number of all.

    Raises:
        InputError: a source has fewer examples than there are processes.
    """

    _WINDOW = 32
    """Batches sorted by length at once: enough to save padding, few enough to stay random."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch_size: int,
        steps: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        super().__init__()
        for source in sources:
            if len(source.examples) < processes:
                raise InputError(
                    f"{source.name} has {len(source.examples)} examples for {processes} processes; expected at least "
                    "one for each"
                )
        self._sources = sources
        self._batch_size = batch_size
        self._steps = steps
        self._seed = seed
        self._process = process
        self._processes = processes

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
            yield next(chance.choices(streams, weights)[0])[self._process :: self._processes]

    def _batches(self, source: Source, offset: int, chance: random.Random) -> Iterator[list[int]]:
        size = min(self._batch_size * self._processes, len(source.examples))
        # every process gets equally many
        size -= size % self._processes
        width = [len(example.query) + len(example.positives[0]) for example in source.examples]
        while True:
            order = list(range(len(source.examples)))
            chance.shuffle(order)
            for start in range(0, len(order), size * self._WINDOW):
                window = sorted(order[start : start + size * self._WINDOW], key=width.__getitem__)
                batches = [window[i : i + size] for i in range(0, len(window) - size + 1, size)]
                chance.shuffle(batches)
                yield from ([offset + index for index in batch] for batch in batches)


class ModelInputs(Protocol):
    """Makes arguments of a model's ``forward`` from texts."""

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> dict[str, Any]:
        """Return the arguments; their names start with ``query_`` or ``document_``."""


@dataclass(frozen=True)
class TokenInputs:
    """Token ids and masks of texts, for a model whose encoder is trained.

    Args:
        read_query, read_document: tokenise and truncate.
        pad_id: the tokenizer's padding id.
    """

    read_query: TextEncoder
    read_document: TextEncoder
    pad_id: int

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> dict[str, Any]:
        """Return ids and masks, padded on the right."""
        query_ids, query_mask = pad(self.read_query(queries), self.pad_id)
        document_ids, document_mask = pad(self.read_document(documents), self.pad_id)
        return {
            "query_input_ids": query_ids,
            "query_attention_mask": query_mask,
            "document_input_ids": document_ids,
            "document_attention_mask": document_mask,
        }


@dataclass(frozen=True)
class Collator:
    """Turns examples of one task into tensors for a model's ``forward`` and for the objective.

    Args:
        inputs: makes the model's inputs.
        negatives: most negatives drawn from an example's list.
        seed: seed of the draws.
        in_batch: score every query of a ranking batch with all documents of the batch. False: each only with its own
            list, which is filled up to 1 + negatives with other queries' right documents.
        graded_list: most documents of a graded list.
        with_lists: also return, for a teacher, the documents of every query that it scores, and the texts.
    """

    inputs: ModelInputs
    negatives: int
    seed: int
    in_batch: bool = True
    graded_list: int = 8
    with_lists: bool = False

    def __call__(self, items: Sequence[tuple[str, Example]]) -> dict[str, Any]:
        """Return a batch.

        With B queries, N documents in all and lists of c documents per query, the keys are:
            task, where: task and locations of the examples.
            those of `inputs`: the model's inputs.
            candidates_per_query: c if every query has its own list, else None; scores are (B, c) or (B, N).
            targets: the right document's column (ranking), a class number or a score (B,), or grades (B, c).
            excluded: bool, shaped as the scores: other right documents, and padding. Rankings only.
            lists, lists_excluded: (B, c) columns of the scores that a teacher scores, and bool, which are padding.
                Rankings with a teacher only.
            queries, documents: the texts; with a teacher only.
        """
        tasks = {task for task, _ in items}
        (task,) = tasks
        examples = [example for _, example in items]
        # the draw depends on the examples alone, not on how many batches came before
        chance = random.Random(f"{self.seed} {examples[0].query} {len(examples)}")
        batch: dict[str, Any] = {"task": task, "where": [example.where for example in examples]}
        if task == "ranking":
            documents = self._rank(examples, chance, batch)
        elif task == "graded":
            documents = self._grade(examples, chance, batch)
        else:
            documents = [example.positives[0] for example in examples]
            # the loss compares scores with one another: float32 could make different ones equal
            dtype = torch.int64 if task == "classification" else torch.float64
            batch["targets"] = torch.tensor([example.target for example in examples], dtype=dtype)
            batch["candidates_per_query"] = 1
        queries = [example.query for example in examples]
        if self.with_lists:
            batch["queries"], batch["documents"] = queries, documents
        return batch | self.inputs(queries, documents)

    def _rank(self, examples: Sequence[Example], chance: random.Random, batch: dict[str, Any]) -> list[str]:
        """Fill in a ranking batch and return its documents: one right one per query and drawn negatives."""
        documents = [chance.choice(example.positives) for example in examples]
        own: list[list[int]] = []
        for row, example in enumerate(examples):
            drawn = chance.sample(example.negatives, min(self.negatives, len(example.negatives)))
            own.append([row, *range(len(documents), len(documents) + len(drawn))])
            documents += drawn
        known = right_documents(examples)
        right = [known[example.query.strip()] for example in examples]
        texts = [text.strip() for text in documents]
        excluded = torch.tensor(
            [[column != row and text in right[row] for column, text in enumerate(texts)] for row in range(len(own))]
        )
        if self.with_lists or not self.in_batch:
            for row, columns in enumerate(own):
                others = [column for column in range(len(examples)) if column != row and not excluded[row, column]]
                missing = 1 + self.negatives - len(columns)
                columns += chance.sample(others, min(missing, len(others)))
        lists, lists_excluded = _padded(own)
        if self.in_batch:
            batch.update(targets=torch.arange(len(examples)), excluded=excluded, candidates_per_query=None)
            if self.with_lists:
                batch.update(lists=lists, lists_excluded=lists_excluded)
            return documents
        excluded = excluded.gather(1, lists) | lists_excluded
        excluded[:, 0] = False
        batch.update(targets=torch.zeros(len(examples), dtype=torch.int64), excluded=excluded)
        return self._own_lists(lists, excluded, documents, batch)

    def _grade(self, examples: Sequence[Example], chance: random.Random, batch: dict[str, Any]) -> list[str]:
        """Fill in a graded batch and return its documents: one list per query, the best document first."""
        documents, own, grades = [], [], []
        for example in examples:
            graded = [
                *zip(example.positives, example.grades, strict=True),
                *((text, 0.0) for text in example.negatives),
            ]
            best = max(graded, key=lambda pair: pair[1])
            graded.remove(best)
            chosen = [best, *chance.sample(graded, min(self.graded_list - 1, len(graded)))]
            own.append([*range(len(documents), len(documents) + len(chosen))])
            documents += [text for text, _ in chosen]
            grades += [grade for _, grade in chosen]
        lists, excluded = _padded(own)
        batch.update(targets=torch.tensor(grades, dtype=torch.float32)[lists], excluded=excluded)
        return self._own_lists(lists, excluded, documents, batch)

    def _own_lists(
        self, lists: torch.Tensor, excluded: torch.Tensor, documents: Sequence[str], batch: dict[str, Any]
    ) -> list[str]:
        """Fill in lists (B, c) of every query's own documents, and return these documents list by list."""
        batch["candidates_per_query"] = lists.shape[1]
        if self.with_lists:
            batch.update(lists=torch.arange(lists.shape[1]).expand_as(lists), lists_excluded=excluded)
        return [documents[column] for column in lists.flatten().tolist()]


def _padded(lists: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad lists with their first number; return them (B, c), and which entries are padding (B, c) bool."""
    width = max(map(len, lists))
    filled = torch.tensor([[*columns, *[columns[0]] * (width - len(columns))] for columns in lists])
    excluded = torch.tensor([[column >= len(columns) for column in range(width)] for columns in lists])
    return filled, excluded
