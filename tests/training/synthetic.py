"""Small relations that a tiny model learns in seconds, and the tiny encoder that learns them."""

import json
import random
from pathlib import Path

import torch

from mixencoder.base.engine import Engine


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


PAIRS = 8
"""Words that have a partner, which the words themselves do not tell."""


def partner_pairs(words: list[str], count: int) -> list[dict]:
    """The document holds the partner of the query's content word, both among noise."""
    chance = random.Random(0)
    noise, left, right = words[:6], words[6 : 6 + PAIRS], words[6 + PAIRS : 6 + 2 * PAIRS]
    rows = []
    for _ in range(count):
        i = chance.randrange(PAIRS)
        rows.append({"query": f"{chance.choice(noise)} {left[i]}", "positive": f"{right[i]} {chance.choice(noise)}"})
    return rows


def ranking_accuracy(model: Engine, words: list[str]) -> float:
    """Return how often the document with the partner comes first; 1 in `PAIRS` is chance."""
    left, right = words[6 : 6 + PAIRS], words[6 + PAIRS : 6 + 2 * PAIRS]
    rankings = model.rank([f"how {word}" for word in left], [f"{word} the" for word in right], top_k=1)
    return sum(ranking[0]["corpus_id"] == i for i, ranking in enumerate(rankings)) / PAIRS


def both_low_pairs(words: list[str], count: int, seed: int = 0) -> list[dict]:
    """The label says whether the words of both texts come from the lower part of the vocabulary; half of them do."""
    chance = random.Random(seed)
    content = words[6:]
    low, high = content[:8], content[8:]
    rows = []
    for number in range(count):
        pair = [chance.choice(low), chance.choice(low)]
        if number % 2:
            pair[chance.randrange(2)] = chance.choice(high)
        rows.append({"premise": pair[0], "hypothesis": pair[1], "label": "mixed" if number % 2 else "low"})
    return rows


def class_accuracy(model: Engine, words: list[str]) -> float:
    """Return the share of right classes on pairs drawn anew; one half is chance."""
    rows = both_low_pairs(words, 200, seed=1)
    logits = model.predict([(row["premise"], row["hypothesis"]) for row in rows], head="classification")
    names = [model.config.id2label[number] for number in logits.argmax(axis=1).tolist()]
    return sum(name == row["label"] for name, row in zip(names, rows, strict=True)) / len(rows)


def scored_pairs(words: list[str], count: int, seed: int = 0) -> list[dict]:
    """The same as scored pairs: those that are both low score 1, the others 0."""
    return [
        {"sentence1": row["premise"], "sentence2": row["hypothesis"], "score": float(row["label"] == "low")}
        for row in both_low_pairs(words, count, seed)
    ]


def order_accuracy(model: Engine, words: list[str]) -> float:
    """Return how often, of two pairs drawn anew, the one with the higher target scores higher; one half is chance."""
    rows = scored_pairs(words, 200, seed=1)
    scores = model.predict([(row["sentence1"], row["sentence2"]) for row in rows], head="ranking")
    high, low = ([score for score, row in zip(scores, rows, strict=True) if row["score"] == t] for t in (1.0, 0.0))
    return sum(h > other for h in high for other in low) / (len(high) * len(low))


def tiny_encoder(folder: Path, tokenizer: object) -> Path:
    """Write a tiny random encoder that learns fast."""
    from transformers import BertModel

    from tests.conftest import backbone_config

    torch.manual_seed(0)
    config = backbone_config(num_hidden_layers=2, initializer_range=0.1)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
