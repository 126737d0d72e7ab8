"""How much of the machine this process may use where control groups limit it, as in a container or a systemd unit.

PyTorch and the operating system count the machine's cores and memory, not the limits. Versions 2 and 1 of Linux'
control groups are read; elsewhere there is no limit.
"""

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_UNLIMITED = 2**60
"""Version 1 writes a number of about this size or more for no limit."""


def cpu_quota(root: Path = _ROOT, own: Path = _OWN) -> float | None:
    """Return the number of cores that this process may use on average; None without a limit."""
    found = []
    for folder in _folders(root, own, "cpu"):
        if len(numbers := _words(folder / "cpu.max")) == 2 and numbers[0].isdigit():
            found.append(int(numbers[0]) / int(numbers[1]))
        quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        if quota and period and quota[0].isdigit():
            found.append(int(quota[0]) / int(period[0]))
    return min(found, default=None)


def memory_limit(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Return the number of bytes of memory that this process may use; None without a limit."""
    found = []
    for folder in _folders(root, own, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (words := _words(folder / name)) and words[0].isdigit() and int(words[0]) < _UNLIMITED:
                found.append(int(words[0]))
    return min(found, default=None)


def _folders(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups with their parents, as a limit of any of them holds.

    In a container the root is the container's own group.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        base = root if number == "0" else root / controller
        if number != "0" and controller not in controllers.split(","):
            continue
        folder = base / path.strip("/")
        yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(base))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
