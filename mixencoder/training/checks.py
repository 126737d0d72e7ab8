"""Checks before training: that the model has the heads, and that texts have tokens and teach something."""

import logging
import os
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from mixencoder.base.empty_texts import Suspect, may_be_tokenless, report_tokenless
from mixencoder.base.engine import Engine
from mixencoder.data.answers import right_documents
from mixencoder.data.sources import Source
from mixencoder.errors import DataError, InputError

logger = logging.getLogger(__name__)


_SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""What ``accelerate launch`` sets in the environment of its processes -> what it asks of the trainer."""


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Raise if the processes were started to share out a model's weights; each saves and scores the whole model.

    Args:
        environment: of the process.

    Raises:
        InputError: accelerate was told to use FSDP or DeepSpeed; the message says what to use.
    """
    for variable, name in _SHARDING.items():
        if environment.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise InputError(
                f"accelerate is set to use {name} ({variable}={environment[variable]}), which parts a model's weights "
                "among processes; expected data-parallel processes (DDP), each with the whole model. Start them with "
                "torchrun, or with accelerate launch --multi_gpu"
            )


def ranking_sources(sources: Sequence[Source]) -> list[str]:
    """Return the names of the sources that need a ranking head."""
    return [source.name for source in sources if source.task != "classification"]


def check_heads(engine: Engine, sources: Sequence[Source], name: str) -> None:
    """Raise if sources need a ranking head that the model lacks; reading them has checked the classification head.

    Args:
        engine: the model.
        sources: the data.
        name: the model's name in the message.

    Raises:
        DataError: the head is missing; the message names the sources and the model.
    """
    lacking = ranking_sources(sources)
    if lacking and "ranking" not in engine.config.heads:
        raise DataError(f"{', '.join(lacking)}: ranking and similarity need a ranking head, which {name} lacks")


def check_texts(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, on_empty: str = "special", *, documents: bool = True
) -> None:
    """Warn about texts without a token, which are read as the tokenizer's special tokens alone, or raise.

    Args:
        sources: the data.
        tokenizer: the model's.
        on_empty: one of `mixencoder.base.empty_texts.ON_EMPTY`.
        documents: whether documents are texts; if not, they are ids.

    Raises:
        DataError: there is such a text, and on_empty is "error"; the message names the row and the text.
    """
    suspects = [
        Suspect(example.where, text)
        for source in sources
        for example in source.examples
        for text in (example.query, *((*example.positives, *example.negatives) if documents else ()))
        if may_be_tokenless(text)
    ]
    report_tokenless(tokenizer, suspects, on_empty=on_empty)


def check_contrast(sources: Sequence[Source], batch_size: int, processes: int, negatives: int) -> None:
    """Raise if data or batches hold nothing to tell apart, so that nothing can be learned.

    Args:
        sources: the data.
        batch_size: examples of a batch in every process.
        processes: number of processes.
        negatives: most listed negatives drawn for each query.

    Raises:
        InputError: there is nothing to tell apart; the message names the source.
    """
    for source in sources:
        rows = min(batch_size, len(source.examples) // processes)
        lists = source.task == "ranking" and negatives > 0 and any(example.negatives for example in source.examples)
        if rows < 2 and source.task in ("ranking", "similarity") and not lists:
            raise InputError(
                f"{source.name} has {len(source.examples)} rows and comes in batches of {rows} a process: there is "
                "nothing to tell apart; expected batches of at least 2 (batch_size), or wrong documents in the data"
            )
        if source.task == "ranking" and not lists and not _has_wrong_documents(source):
            raise InputError(
                f"{source.name}: every right document is right for every query of its {len(source.examples)} rows: "
                "there is nothing to tell apart; expected other queries with other documents, or wrong documents"
            )
        if source.task == "graded" and not any(
            len({*example.grades, *(0.0 for _ in example.negatives)}) > 1 for example in source.examples
        ):
            raise InputError(
                f"{source.name}: in every list all documents have one label: there is nothing to tell apart; expected "
                "lists whose labels differ"
            )


def _has_wrong_documents(source: Source) -> bool:
    """Return whether some right document is wrong for the query of another row."""
    right = right_documents(source.examples)
    every = set().union(*right.values())
    return any(len(documents) < len(every) for documents in right.values())
