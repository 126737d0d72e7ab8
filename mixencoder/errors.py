"""The errors and warnings of mixencoder. The command line turns its errors into exit code 2."""


class MixEncoderError(Exception):
    """Base of all errors raised by mixencoder."""


class InputError(MixEncoderError, ValueError):
    """An argument or a text cannot be used: the message says what was found and what was expected."""


class DataError(MixEncoderError, ValueError):
    """A data file cannot be used; the message names the file and, where there is one, the line."""


class CheckpointError(MixEncoderError, ValueError):
    """A checkpoint is missing, damaged, or of another kind of model."""


class UnsupportedBackboneError(MixEncoderError, ValueError):
    """The encoder cannot serve as backbone; the message says why."""


class MissingExtraError(MixEncoderError, ImportError):
    """A feature needs packages of an optional extra; the message names the extra to install."""


class NonFiniteError(MixEncoderError, ArithmeticError):
    """A computation gave NaN or an infinity; raised instead of returning it."""


class ForkedProcessError(MixEncoderError, RuntimeError):
    """A model was called in a fork of a process that had computed with threads; it would hang there."""


class IndexStateError(MixEncoderError, ValueError):
    """The index cannot be used for this call: absent, unfinished, closed, read-only, or of a newer format."""


class IndexMismatchError(MixEncoderError, ValueError):
    """The index was made by another model, tokenizer or settings; the message names both and what differs."""


class IndexDamagedError(MixEncoderError, ValueError):
    """A file of the index is not what was committed; the message names the file."""


class IndexLockedError(MixEncoderError, OSError):
    """Another process or thread is writing the index."""


class IndexStorageError(MixEncoderError, OSError):
    """The disk is full, read-only or failing. What was committed before is intact."""


class UnknownIdError(MixEncoderError, ValueError):
    """The index does not hold some ids; the message names them."""


class DuplicateIdError(MixEncoderError, ValueError):
    """Some ids are in the index already or are given twice; the message names them."""


class TruncationWarning(UserWarning):
    """Texts longer than the model reads were cut; the message holds the count."""


class EncoderWarning(UserWarning):
    """An encoder was trained with a pooling or modules that the model on top does not use; the message names them."""


class EmptyTextWarning(UserWarning):
    """Texts hold no token and were read as the tokenizer's special tokens alone; the message holds the count."""
