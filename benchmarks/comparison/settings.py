"""Tasks with their data, contenders, and settings: small (two CPU cores), medium (minutes of a GPU), full (hours)."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """Data that every contender is measured on."""

    path: str
    """Relative to the data folder; for ``lists/`` to the work folder."""
    measure: str
    """The measure shown in tables; records hold all default measures of the task."""


@dataclass(frozen=True)
class ComparedTask:
    """One of the paper's four tasks, on public data."""

    train: tuple[str, ...]
    """PATH=WEIGHT, relative to the data folder."""
    reports: tuple[Report, ...]
    batch_size: int
    """Batch size, to be multiplied by the setting's `batch_factor`."""
    steps: dict[str, int]
    """Setting -> optimiser steps."""
    learning_rate: float = 5e-5
    """Peak rate of the backbone."""


@dataclass(frozen=True)
class Contender:
    """An architecture with its configuration and training."""

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of its configuration."""
    training: dict[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig` that differ from the others': none in the comparison, the varied ones in an ablation."""
    teacher: str | None = None
    """Contender of the same task and seed whose scores it learns from, in addition to the labels."""
    varied: str = ""
    """What an ablation changes, for its table."""


@dataclass(frozen=True)
class Curve:
    """One task of the learning curves."""

    train: tuple[str, ...]
    """PATH=WEIGHT inside the data folder."""
    reports: tuple[Report, ...]
    contenders: dict[str, Contender]
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Setting:
    """How much is trained and measured."""

    seeds: tuple[int, ...]
    queries: int | None
    """Drawn with a fixed seed from every report; None takes all."""
    pairs: int | None
    """The same for labelled pairs, which take one pass each instead of one per candidate."""
    joint_long_queries: int | None
    """Queries with a thousand candidates that a model which reads query and candidate together is measured on."""
    bf16: bool
    batch_factor: int = 1
    """Factor on `ComparedTask.batch_size`."""
    measured_at_once: int = 32
    """Texts or pairs per batch of the evaluation."""
    students: bool = True
    """Whether to train contenders that have a teacher; pointless if the teacher itself is hardly trained."""


MIXENCODER = {"num_context_embeddings": 1, "interaction_layers": [-1], "dual_term": True}

LONG = "lists/ubuntu_irc_1in1000.jsonl"
"""Made from the lists of 100 with random other replies: quality as the list grows."""
LONG_SOURCE = "dialogue/ubuntu_irc_1in100.dev.jsonl.gz"
LONG_CANDIDATES = 1000
SAMPLE_SEED = 0

TASKS = {
    "nli": ComparedTask(
        train=(
            "nli/snli.train.jsonl.gz=1",
            "nli/mnli_mismatched.train.jsonl.gz=2",
            "nli/joci.train.jsonl.gz=0.5",
        ),
        reports=(Report("nli/mnli_matched.dev.jsonl.gz", "accuracy"),),
        batch_size=32,
        steps={"small": 250, "medium": 500, "full": 6000},
        # the backbone knows little about contradiction, so it must learn more
        learning_rate=1e-4,
    ),
    "replies": ComparedTask(
        train=("dialogue/ubuntu_irc.train.jsonl.gz",),
        reports=(
            Report("dialogue/ubuntu_irc_1in10.dev.jsonl.gz", "R@1"),
            Report(LONG_SOURCE, "R@1"),
            Report(LONG, "R@1"),
        ),
        batch_size=16,
        steps={"small": 80, "medium": 500, "full": 3000},
    ),
    "answers": ComparedTask(
        train=("answers/selqa.train.jsonl.gz=5", "answers/trecqa.train.jsonl.gz=1"),
        reports=(
            Report("answers/wikiqa.test.jsonl.gz", "nDCG@10"),
            Report("answers/trecqa.dev.jsonl.gz", "nDCG@10"),
        ),
        batch_size=16,
        steps={"small": 80, "medium": 250, "full": 600},
    ),
    "passages": ComparedTask(
        train=("rerank/scifact",),
        reports=(Report("rerank/scifact", "nDCG@10"),),
        batch_size=16,
        steps={"small": 30, "medium": 150, "full": 400},
    ),
}

READ_JOINTLY = ("cross-encoder", "deformer")
JOINT_NEGATIVES = 3
"""Negatives of the models that read query and candidate together, which need a whole pass for each; the others use all
candidates of a batch."""

CONTENDERS = {
    "cross-encoder": Contender("cross-encoder"),
    "dual-encoder": Contender("dual-encoder"),
    "poly-encoder": Contender("poly-encoder", {"num_codes": 16}),
    # the backbone's own token vectors: a projection starts at random and would need longer training
    "late-interaction": Contender("late-interaction", {"projection_dim": None}),
    "deformer": Contender("deformer", {"joint_layers": 2}),
    "mixencoder": Contender("mixencoder", MIXENCODER),
    # lists as long as those that the teacher learned from
    "mixencoder-distilled": Contender(
        "mixencoder", MIXENCODER, {"negatives": JOINT_NEGATIVES}, teacher="cross-encoder"
    ),
}

_PAIRS = 80 * 16
"""Training pairs of an ablation, the same for other batch sizes."""

ABLATIONS = {
    "no-state-row": Contender("mixencoder", MIXENCODER | {"state_row": False}, varied="no state row"),
    "no-context-update": Contender("mixencoder", MIXENCODER | {"context_update": False}, varied="no context update"),
    "k-2": Contender("mixencoder", MIXENCODER | {"num_context_embeddings": 2}, varied="k = 2"),
    "k-4": Contender("mixencoder", MIXENCODER | {"num_context_embeddings": 4}, varied="k = 4"),
    "two-layers": Contender("mixencoder", MIXENCODER | {"interaction_layers": [-2, -1]}, varied="J = 2, last layers"),
    "three-layers": Contender(
        "mixencoder", MIXENCODER | {"interaction_layers": [-3, -2, -1]}, varied="J = 3, last layers"
    ),
    "middle-layer": Contender("mixencoder", MIXENCODER | {"interaction_layers": [2]}, varied="J = 1, third layer of 6"),
    "first-token": Contender("mixencoder", MIXENCODER | {"pooling": "first"}, varied="first token instead of the mean"),
    "no-dual-term": Contender(
        "mixencoder", MIXENCODER | {"dual_term": False}, varied="no dual term: the published setting"
    ),
    "no-dual-term-k-4": Contender(
        "mixencoder",
        MIXENCODER | {"dual_term": False, "num_context_embeddings": 4, "interaction_layers": [-2, -1]},
        varied="published, k = 4, J = 2",
    ),
    "one-loss": Contender(
        "mixencoder", MIXENCODER, {"interaction_loss_weight": 0.0}, varied="no ranking loss of the interaction's own"
    ),
    "distilled": Contender("mixencoder", MIXENCODER, teacher="cross-encoder", varied="taught by the cross-encoder"),
    "7-negatives": Contender(
        "mixencoder", MIXENCODER, {"batch_size": 8, "steps": _PAIRS // 8}, varied="7 in-batch negatives, same pairs"
    ),
    "31-negatives": Contender(
        "mixencoder", MIXENCODER, {"batch_size": 32, "steps": _PAIRS // 32}, varied="31 in-batch negatives, same pairs"
    ),
}
"""MixEncoder as compared, with one thing changed."""
ABLATED = "replies"
"""The task of the ablations."""

SETTINGS = {
    "small": Setting(seeds=(0,), queries=300, pairs=1500, joint_long_queries=15, bf16=False, students=False),
    "medium": Setting(
        seeds=(0,), queries=300, pairs=None, joint_long_queries=15, bf16=True, batch_factor=2, measured_at_once=256
    ),
    "full": Setting(seeds=(0, 1, 2), queries=None, pairs=None, joint_long_queries=None, bf16=True),
}

TRAINING: dict[str, Any] = {
    "head_learning_rate": 5e-4,
    "negatives": None,
    "max_query_tokens": 64,
    # the most that a cross-encoder can read of 300 lists of 100 passages in the small setting's time
    "max_document_tokens": 96,
}
"""The same for all contenders, tuned for none."""

CURVE_CONTENDERS = {
    "cross-encoder": CONTENDERS["cross-encoder"],
    "dual-encoder": CONTENDERS["dual-encoder"],
    "late-interaction": CONTENDERS["late-interaction"],
    "mixencoder": CONTENDERS["mixencoder"],
    "mixencoder-published": Contender("mixencoder", MIXENCODER | {"dual_term": False}, varied="no dual term"),
}

CURVES = {
    "nli": Curve(
        train=(
            "nli/snli.train.jsonl.gz=1",
            "nli/mnli_mismatched.train.jsonl.gz=2",
            "nli/sick.train.jsonl.gz=0.5",
        ),
        reports=TASKS["nli"].reports,
        contenders=CURVE_CONTENDERS,
        batch_size=32,
        learning_rate=1e-4,
    ),
    "replies": Curve(
        train=TASKS["replies"].train,
        reports=TASKS["replies"].reports[:2],
        contenders=CURVE_CONTENDERS,
        batch_size=32,
        learning_rate=5e-5,
    ),
}
"""Data that may be reported but not ship weights (SICK) are in: nothing trained here is published."""
