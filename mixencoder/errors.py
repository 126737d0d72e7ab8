"""Every error that mixencoder raises on purpose, and its warnings. The command line turns them into exit code 2."""


class MixEncoderError(Exception):
    """Base of all errors raised by mixencoder."""


class InputError(MixEncoderError, ValueError):
    """An argument or a text cannot be used: the message says what was found and what was expected."""


class DataError(MixEncoderError, ValueError):
    """A data file cannot be used; the message names the file and, where there is one, the line."""


class CheckpointError(MixEncoderError, ValueError):
    """A checkpoint is missing, damaged, or belongs to another kind of model."""


class UnsupportedBackboneError(MixEncoderError, ValueError):
    """The encoder cannot serve as backbone; the message says why."""


class MissingExtraError(MixEncoderError, ImportError):
    """A feature needs packages that only an extra installs; the message names the extra."""


class NonFiniteError(MixEncoderError, ArithmeticError):
    """A computation gave NaN or an infinity; raised instead of returning it."""


class ForkedProcessError(MixEncoderError, RuntimeError):
    """A model was asked to compute in the fork of a process that computes with threads, where it would hang."""


class IndexStateError(MixEncoderError, ValueError):
    """The index cannot be used like this: no index there, unfinished, closed, read-only, or of a newer format."""


class IndexMismatchError(MixEncoderError, ValueError):
    """The index was made by another model, tokenizer or settings; the message names both and what differs."""


class IndexDamagedError(MixEncoderError, ValueError):
    """A file of the index is not what was committed; the message names the file."""


class IndexLockedError(MixEncoderError, OSError):
    """Another writer is at work on the index."""


class IndexStorageError(MixEncoderError, OSError):
    """The disk refused: full, read-only or failing. What was committed before is intact."""


class UnknownIdError(MixEncoderError, ValueError):
    """Ids that the index does not hold; the message names them."""


class DuplicateIdError(MixEncoderError, ValueError):
    """Ids that are held already or given twice; the message names them."""


class TruncationWarning(UserWarning):
    """Texts longer than the model reads were cut; the message holds the count."""


class EncoderWarning(UserWarning):
    """An encoder was trained to be read otherwise than the model on top of it reads it; the message names both."""


class EmptyTextWarning(UserWarning):
    """Texts hold no token and were read as the tokenizer's special tokens alone; the message holds the count."""
