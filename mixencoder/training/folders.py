"""The folder in which a run keeps its checkpoints until its model is whole, and what it may touch there.

A run writes in OUTPUT.unfinished. It takes a folder that is new, empty, or marked by an earlier run (`MARKER`); what
else lies there belongs to somebody else, and stays. Nothing is removed before all that was named has been checked.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mixencoder.durable import is_vacant, readable_folder, sync_folder
from mixencoder.errors import CheckpointError, InputError

MARKER = "mixencoder-run.json"
"""File that a run puts into its folder first: its settings, and a hash of everything that it read."""
RECORD = "training.json"
"""File beside the weights of a trained model: how it was trained."""
COMPLETE = "complete"
"""Empty file that a checkpoint gets last: without it, writing was interrupted."""
_DRAFT = f"{MARKER}.new"
_CHECKPOINT = re.compile(r"checkpoint-[1-9][0-9]*")
_MAY_CHANGE = ("output", "resume", "save_every", "log_every")
"""Settings that a resumed run may have other values of; where the output lies is where the folder was found."""


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, whole ones and halves: folders named as a run names them, no links."""
    found = [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder that was written to its end, None if there is none."""
    whole = [path for path in checkpoints(folder) if (path / COMPLETE).is_file()]
    return whole[-1] if whole else None


def unfinished_folder(output: str | Path) -> Path:
    """Return the folder of a run's checkpoints, beside its output.

    Raises:
        InputError: the output has no name of its own, as the root has none.
    """
    path = Path(output)
    if path.name in ("", ".."):
        path = path.resolve()
    if not path.name:
        raise InputError(f"output is {output}; expected a directory for the trained model")
    return path.with_name(f"{path.name}.unfinished")


class RunFolder:
    """One run's hold on its folder, from `held` to its end.

    Args:
        output: directory for the trained model.
        settings: the run's own, as JSON has them.
        resume: whether it may go on from what an earlier run left.

    Attributes:
        path: the folder.
        is_done: the earlier run had come to its end, and the output holds its model.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.output, self.path = output, unfinished_folder(output)
        self.is_done = False
        self._settings, self._resume = settings, resume
        self._before: dict[str, Any] | None = None
        self._was_there = False

    @contextmanager
    def held(self) -> Generator[None]:
        """Keep other runs from the folder until this one ends or dies, having seen that this one may have it.

        Raises:
            InputError: the output or the folder cannot be written or belongs to somebody else, a run that still goes on
                has it, or it holds a run that this one cannot go on with; nothing has changed then.
        """
        self._was_there = os.path.lexists(self.path)
        made = self._make()
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"{self.path} is being written by a run that still goes on; wait for it, or end it"
                raise InputError(message) from error
            try:
                self._inspect()
            except OSError as error:
                raise InputError(f"{self.output} cannot be used: {error}; name another output") from error
            yield
        finally:
            os.close(descriptor)
            # a run that was refused leaves nothing, and what is not empty stays
            _remove_empty(made)

    def begin(self, read: Mapping[str, str]) -> None:
        """Mark the folder as this run's, or see that an interrupted run read the same; all checks have passed.

        Args:
            read: for everything that was read, by name, something that changes when it does.

        Raises:
            InputError: an interrupted run read something else.
            CheckpointError: the folder cannot be written.
        """
        if self._before is not None and last_checkpoint(self.path) is not None:
            self._compare_read(self._before["read"], read)
            return
        try:
            # what is there cannot be used: a run died before its first checkpoint was whole
            self._clear()
            draft = self.path / _DRAFT
            draft.unlink(missing_ok=True)
            with draft.open("x", encoding="utf-8") as file:
                json.dump({"settings": self._settings, "read": read}, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.path / MARKER)
            sync_folder(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}") from error

    def remove(self) -> None:
        """Remove what the run wrote; the folder itself stays if there is anything else in it."""
        self._clear()
        # last, so that a folder which was half removed is known again
        for name in (_DRAFT, MARKER):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def _clear(self) -> None:
        for path in checkpoints(self.path):
            shutil.rmtree(path)

    def _make(self) -> list[Path]:
        """Make the folder and those above it; return what was made, the lowest first."""
        missing = [folder for folder in (self.path, *self.path.parents) if not os.path.lexists(folder)]
        made: list[Path] = []
        try:
            for folder in reversed(missing):
                folder.mkdir()
                made.insert(0, folder)
            if not self.path.is_dir() or self.path.is_symlink():
                raise InputError(f"{self.path} is in the way: it is no folder of a run; name another output")
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise InputError(f"{self.path} cannot be written: permission denied; name another output")
        except (OSError, InputError) as error:
            _remove_empty(made)
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.output} cannot be written: {error}; name another output") from error
        return made

    def _inspect(self) -> None:
        """See what an earlier run left, and that this one may go on with it."""
        if self.output.is_symlink() and not self.output.exists():
            raise InputError(f"{self.output} is a link to nothing; name another output, or remove it")
        place = self.output if self.output.is_dir() else self.output.parent
        if not os.access(place, os.W_OK | os.X_OK):
            raise InputError(f"{place} cannot be written: permission denied; name another output")
        held = {path.name for path in self.path.iterdir()}
        if held - {_DRAFT} and MARKER not in held:
            raise InputError(
                f"{self.path} holds files that no run of this version left there, such as {min(held)}; name another "
                "output, or move them away"
            )
        self.is_done = self._was_there and (readable_folder(self.output) / RECORD).is_file()
        if not is_vacant(self.output) and not (self._resume and self.is_done):
            raise InputError(f"{self.output} exists and is not empty; name another output, or move it away")
        if MARKER in held:
            self._before = self._read_marker()
        if not self.is_done and last_checkpoint(self.path) is None:
            return
        if not self._resume:
            raise InputError(
                f"{self.path} holds an interrupted run; go on with it (resume), or remove it to start again"
            )
        # of a run that died while it cleaned up, the settings may be gone
        before = self._settings if self._before is None else self._before["settings"]
        changed = [
            name for name in self._settings if name not in _MAY_CHANGE and self._settings[name] != before.get(name)
        ]
        if changed:
            found = ", ".join(f"{name} {self._settings[name]!r} instead of {before.get(name)!r}" for name in changed)
            raise InputError(f"{self.path} was begun with other settings: {found}; resume with the same ones")

    def _read_marker(self) -> dict[str, Any]:
        path = self.path / MARKER
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {error}; remove {self.path} to start again") from error
        if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in ("settings", "read")):
            raise InputError(f"{path} says nothing about a run; remove {self.path} to start again")
        return found

    def _compare_read(self, before: Mapping[str, Any], read: Mapping[str, str]) -> None:
        if changed := [name for name in {**before, **read} if before.get(name) != read.get(name)]:
            raise InputError(
                f"{self.path} was begun with other contents of {', '.join(changed)}; resume with what it read, or "
                "remove it to start again"
            )


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
