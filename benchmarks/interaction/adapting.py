"""What labelled queries of one domain give on top of vectors that stay as they are.

``python -m benchmarks.interaction.adapting --data-dir DATA --backbone MINILM --device NAME``. The encoder's vectors of
MedQuAD's answers are stored once. Held-out questions rank all of them: by cosine; with a query adapter alone, trained
on 500 and 5,000 labelled questions; with adapter and interaction (``train --freeze-encoder --index``); and after
fine-tuning everything, which encodes the answers again. Writes adapting.json.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from benchmarks.measuring.provenance import ROOT, commit
from mixencoder import CandidateIndex, MixEncoder
from mixencoder.data.examples import read_source
from mixencoder.evaluation.files import write_text
from mixencoder.evaluation.measures import RankingMeasures
from mixencoder.training.losses import ranking_loss
from mixencoder.training.run import DataSpec, TrainConfig, train

DATA = "answers/medquad.train.jsonl.gz"
LABELLED, HELD_OUT = (500, 5000), 500
MAX_TOKENS = 128
SEED = 0
BATCH = 32
FROZEN_STEPS, FINE_TUNING_STEPS = 2000, 500
"""Fine-tuning takes tens of times as long for a step."""
MEASURES = ("nDCG@10", "Success@1")


class Labels(NamedTuple):
    """Questions with the id of the right answer."""

    questions: list[str]
    answers: list[str]

    def rows(self) -> list[dict[str, str]]:
        """Rows of training data."""
        return [{"query": q, "positive": a} for q, a in zip(self.questions, self.answers, strict=True)]


def read_labels(path: Path) -> tuple[dict[str, str], Labels, Labels]:
    """Return the answers by id, and the labels to train on and those held out, in a fixed random order."""
    examples = read_source(path).examples
    random.Random(SEED).shuffle(examples)
    ids = {text: str(number) for number, text in enumerate(dict.fromkeys(e.positives[0] for e in examples))}
    labels = Labels([e.query for e in examples], [ids[e.positives[0]] for e in examples])
    held, rest = slice(0, HELD_OUT), slice(HELD_OUT, None)
    parts = [Labels(labels.questions[part], labels.answers[part]) for part in (rest, held)]
    return {name: text for text, name in ids.items()}, parts[0], parts[1]


def quality(model: MixEncoder, index: CandidateIndex, held_out: Labels, score: str) -> dict[str, float]:
    """Rank all answers for the questions held out."""
    rankings = model.rank(held_out.questions, index, 10, score=score, prefilter=None, show_progress_bar=False)
    measures = RankingMeasures(MEASURES, [{answer: 1} for answer in held_out.answers])
    found = measures([[(entry["id"], entry["score"]) for entry in ranking] for ranking in rankings])
    return {name: found[name].value for name in MEASURES}


def with_adapter_alone(path: Path, index: CandidateIndex, labels: Labels) -> MixEncoder:
    """Train the query adapter of an untrained model alone, on the cosine of query and stored vector."""
    model = MixEncoder.from_pretrained(path).with_limits(max_query_length=MAX_TOKENS)
    adapter = model.model.query_adapter
    assert adapter is not None, "from_vectors makes an adapter"
    queries = model.encode_query(labels.questions, show_progress_bar=False).pooled
    assert queries is not None, "a model with the dual term has the query's vector"
    queries = queries.clone()
    documents = F.normalize(model.read_embeddings(index, labels.answers)[:, 0].clone(), dim=-1)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=3e-4, weight_decay=0.01)
    chance = torch.Generator().manual_seed(SEED)
    for step in range(FROZEN_STEPS):
        for group in optimiser.param_groups:
            group["lr"] = 3e-4 * (1 - step / FROZEN_STEPS)
        rows = torch.randperm(len(queries), generator=chance)[:BATCH]
        scores = 20 * F.normalize(adapter(queries[rows]), dim=-1) @ documents[rows].T
        same = torch.tensor([[labels.answers[a] == labels.answers[b] for b in rows] for a in rows])
        loss = ranking_loss(scores, torch.arange(len(rows)), same & ~torch.eye(len(rows), dtype=torch.bool))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interaction.adapting", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data")
    parser.add_argument("--backbone", required=True, help="the encoder that made the vectors")
    parser.add_argument("--device", required=True, help="name of the machine, of the folder of results")
    options = parser.parse_args(arguments)
    texts, rest, held_out = read_labels(options.data_dir / DATA)
    records: list[dict[str, Any]] = []

    def add(what: str, labels: int, seconds: float, model: MixEncoder, index: CandidateIndex, score: str) -> None:
        records.append({"what": what, "labels": labels, "seconds": seconds, **quality(model, index, held_out, score)})
        print(records[-1], flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        untrained = MixEncoder.from_vectors(options.backbone, max_document_length=MAX_TOKENS)
        untrained.save_pretrained(folder / "model")
        # the vectors that somebody may keep already
        vectors = untrained.encode_document(list(texts.values()))[:, 0]
        index = untrained.index(embeddings=vectors, ids=texts, path=folder / "index", layout="compact")
        add("cosine", 0, 0.0, untrained, index, "dual")
        for count in LABELLED:
            labels = Labels(rest.questions[:count], rest.answers[:count])
            start = time.perf_counter()
            adapted = with_adapter_alone(folder / "model", index, labels)
            add("query adapter alone", count, time.perf_counter() - start, adapted, index, "dual")
            shared = {"batch_size": BATCH, "max_query_tokens": MAX_TOKENS, "max_document_tokens": MAX_TOKENS}
            start = time.perf_counter()
            frozen = train(
                TrainConfig(
                    output=folder / f"frozen-{count}",
                    data=[DataSpec(labels.rows())],
                    model=folder / "model",
                    freeze_encoder=True,
                    index=folder / "index",
                    steps=FROZEN_STEPS,
                    bf16=True,
                    **shared,
                )
            )
            add("adapter and interaction", count, time.perf_counter() - start, frozen, index, "full")
            start = time.perf_counter()
            tuned = train(
                TrainConfig(
                    output=folder / f"tuned-{count}",
                    data=[DataSpec([row | {"positive": texts[row["positive"]]} for row in labels.rows()])],
                    model=folder / "model",
                    steps=FINE_TUNING_STEPS,
                    bf16=True,
                    **shared,
                )
            )
            seconds = time.perf_counter() - start
            encoded = tuned.index(texts.values(), ids=texts, layout="compact")
            add("everything", count, seconds, tuned, encoded, "full")
    record = {"data": DATA, "held out": HELD_OUT, "answers": len(texts), "seed": SEED, "commit": commit()}
    record |= {"threads": torch.get_num_threads(), "records": records}
    path = ROOT / "benchmarks" / "results" / options.device / "adapting.json"
    write_text(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
