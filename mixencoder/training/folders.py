"""The folder of a run's checkpoints, OUTPUT.unfinished: locked, marked, and removed once the model is saved.

A run accepts a folder that is new, empty, or marked by an earlier run (`MARKER`), and removes only its own files from
it. Nothing is removed before all settings and data have been checked.
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

from mixencoder.base.checkpoints.checkpoint import RECORD
from mixencoder.durable import is_vacant, readable_folder, sync_folder
from mixencoder.errors import CheckpointError, InputError

MARKER = "mixencoder-run.json"
"""File that a run puts into its folder first: its settings, and a hash of everything that it read."""
COMPLETE = "complete"
"""Empty file that a checkpoint gets last: without it, writing was interrupted."""
_DRAFT = f"{MARKER}.new"
_CHECKPOINT = re.compile(r"checkpoint-[1-9][0-9]*")
_MAY_CHANGE = ("output", "resume", "save_every", "log_every")
"""Settings that a resumed run may change. The output may have moved together with the folder."""


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in a run's folder, complete or not, the oldest first; links are ignored."""
    found = [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    found = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a run's folder, None if there is none."""
    complete = [path for path in checkpoints(folder) if (path / COMPLETE).is_file()]
    return complete[-1] if complete else None


def unfinished_folder(output: str | Path) -> Path:
    """Return the folder of a run's checkpoints, next to its output.

    Raises:
        InputError: the output is the root folder, which has no name.
    """
    path = Path(output)
    if path.name in ("", ".."):
        path = path.resolve()
    if not path.name:
        raise InputError(f"output is {output}; expected a directory for the trained model")
    return path.with_name(f"{path.name}.unfinished")


class RunFolder:
    """The checkpoint folder of one run, locked while `held`.

    Args:
        output: directory for the trained model.
        settings: the run's settings, as JSON values.
        resume: whether the run may continue an earlier one.

    Attributes:
        path: the folder.
        is_done: the earlier run was finished, and the output holds its model.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.output, self.path = output, unfinished_folder(output)
        self.is_done = False
        self._settings, self._resume = settings, resume
        self._before: dict[str, Any] | None = None
        self._existed = False

    @contextmanager
    def held(self) -> Generator[None]:
        """Check that this run may use the folder, and keep other runs from it until this one ends or dies.

        Raises:
            InputError: the output or the folder cannot be written or holds other files, another run is using it, or it
                holds a run that this one cannot continue; nothing has changed then.
        """
        self._existed = os.path.lexists(self.path)
        made = self._make()
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"{self.path} is in use by another run; wait for it, or end it"
                raise InputError(message) from error
            try:
                self._inspect()
            except OSError as error:
                raise InputError(f"{self.output} cannot be used: {error}; name another output") from error
            yield
        finally:
            os.close(descriptor)
            # so that a run which may not use the folder leaves nothing behind; folders with files stay
            _remove_empty(made)

    def begin(self, read: Mapping[str, str]) -> None:
        """Mark the folder as this run's, or check that the interrupted run read the same; call it after other checks.

        Args:
            read: {name: hash} of everything that the run reads.

        Raises:
            InputError: an interrupted run read something else.
            CheckpointError: the folder cannot be written.
        """
        if self._before is not None and last_checkpoint(self.path) is not None:
            self._compare_read(self._before["read"], read)
            return
        try:
            # checkpoints here are unusable: a run died before its first one was complete
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
        """Remove what the run wrote; the folder itself stays if it holds anything else."""
        self._clear()
        # last, so that a half-removed folder is still recognised
        for name in (_DRAFT, MARKER):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def _clear(self) -> None:
        for path in checkpoints(self.path):
            shutil.rmtree(path)

    def _make(self) -> list[Path]:
        """Make the folder and its missing parents; return what was made, the lowest first."""
        missing = [folder for folder in (self.path, *self.path.parents) if not os.path.lexists(folder)]
        made: list[Path] = []
        try:
            for folder in reversed(missing):
                folder.mkdir()
                made.insert(0, folder)
            if not self.path.is_dir() or self.path.is_symlink():
                raise InputError(f"{self.path} is in the way: checkpoints need a folder there; name another output")
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise InputError(f"{self.path} cannot be written: permission denied; name another output")
        except (OSError, InputError) as error:
            _remove_empty(made)
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.output} cannot be written: {error}; name another output") from error
        return made

    def _inspect(self) -> None:
        """Check what an earlier run left, and that this one may continue it."""
        if self.output.is_symlink() and not self.output.exists():
            raise InputError(f"{self.output} is a broken link; name another output, or remove it")
        target = self.output if self.output.is_dir() else self.output.parent
        if not os.access(target, os.W_OK | os.X_OK):
            raise InputError(f"{target} cannot be written: permission denied; name another output")
        held = {path.name for path in self.path.iterdir()}
        if held - {_DRAFT} and MARKER not in held:
            raise InputError(
                f"{self.path} holds files that no run of this version left there, such as {min(held)}; name another "
                "output, or move them away"
            )
        self.is_done = self._existed and (readable_folder(self.output) / RECORD).is_file()
        if not is_vacant(self.output) and not (self._resume and self.is_done):
            raise InputError(f"{self.output} exists and is not empty; name another output, or move it away")
        if MARKER in held:
            self._before = self._read_marker()
        if not self.is_done and last_checkpoint(self.path) is None:
            return
        if not self._resume:
            raise InputError(f"{self.path} holds an interrupted run; continue it (resume), or remove it to start again")
        # a run that died while it cleaned up may have removed its settings
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
            raise InputError(f"{path} does not describe a run; remove {self.path} to start again")
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
