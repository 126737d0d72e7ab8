"""What is refused before training: data that a model has no head for, that cannot be read, or that teach nothing."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from mixencoder.engine import Engine
from mixencoder.errors import DataError, InputError
from mixencoder.training.examples import Source


def ranked(sources: Sequence[Source]) -> list[str]:
    """Return the names of sources that a ranking head learns."""
    return [source.name for source in sources if source.task != "classification"]


def check_heads(engine: Engine, sources: Sequence[Source], who: str) -> None:
    """Refuse sources that a model has no head for; whether there is one for classes was seen when they were read.

    Raises:
        DataError: naming them, and who lacks the head.
    """
    lacking = ranked(sources)
    if lacking and "ranking" not in engine.config.heads:
        raise DataError(f"{', '.join(lacking)}: ranking and similarity need a ranking head, which {who} lacks")


def check_texts(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse texts without a token, which would stop the run when their batch comes.

    Raises:
        DataError: naming the row and the text.
    """
    for source in sources:
        for example in source.examples:
            for text in (example.query, *example.positives, *example.negatives):
                # tokenizers turn letters and digits into some token, though it be the unknown one
                if any(map(str.isalnum, text)) or tokenizer(text, add_special_tokens=False)["input_ids"]:
                    continue
                raise DataError(f"{example.where}: {text!r} holds no token; expected some text")


def check_contrast(sources: Sequence[Source], batch_size: int, processes: int, negatives: int) -> None:
    """Refuse batches in which there is nothing to tell apart, whose loss is 0 whatever the model does.

    Args:
        sources: read from the data.
        batch_size: of every process.
        processes: that share out every batch.
        negatives: listed ones drawn for each query.

    Raises:
        InputError: naming the source.
    """
    for source in sources:
        rows = min(batch_size, len(source.examples) // processes)
        lists = source.task == "ranking" and negatives > 0 and any(example.negatives for example in source.examples)
        if rows < 2 and source.task in ("ranking", "similarity") and not lists:
            raise InputError(
                f"{source.name} has {len(source.examples)} rows and comes in batches of {rows} a process: there is "
                "nothing to tell apart; expected batches of at least 2 (batch_size), or wrong documents in the data"
            )
