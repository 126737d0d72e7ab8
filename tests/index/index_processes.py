"""Processes that share one index, for test_index_faults: writers that are killed, readers beside a writer.

Run as a script, so that children are forked from a process in which torch has no threads:
``python tests/index/index_processes.py SCENARIO FOLDER NUMBER``. Exits with 0 if every check passed.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from mixencoder.errors import IndexLockedError, IndexStorageError
from mixencoder.index import CandidateIndex, Entry, catalogue, shards
from tests.index.index_stub import as_format_1, build, check, create, reopen

GROUP = 6


def fork(work, *arguments) -> int:
    """Run work in a forked child and return its process id; the child exits with 1 if work fails."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work(*arguments)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def apply(expected: dict[str, str], kind: str, ids: list[str], texts: list[str]) -> dict[str, str]:
    """Return the content of an index after a change, as id -> text in order."""
    after = {id: text for id, text in expected.items() if kind not in ("remove", "update") or id not in ids}
    if kind in ("add", "update"):
        after.update(zip(ids, texts, strict=True))
    return after


def change_at_random(rng: random.Random, expected: dict[str, str], label: str) -> tuple[str, list[str], list[str]]:
    kind = rng.choices(["add", "update", "remove", "compact"], [6, 3, 3, 2 if expected else 0])[0]
    if kind == "compact":
        return kind, [], []
    if kind == "add" or not expected:
        ids = [f"{label}-{i}" for i in range(rng.choice([1, 1, 3, 40, 1, 3, 1, 700 if len(expected) < 500 else 1]))]
        return "add", ids, [f"text {id}" + "|x" * rng.randrange(3) for id in ids]
    ids = rng.sample(sorted(expected), min(len(expected), rng.choice([1, 5, 5, 300])))
    return kind, ids, [f"{expected[id]} {label}"[-60:] for id in ids]


def carry_out(index: CandidateIndex, kind: str, ids: list[str], texts: list[str]) -> None:
    if kind == "compact":
        index.compact()
    elif kind == "remove":
        index.remove(ids)
    else:
        getattr(index, kind)(texts, ids)


def write_until_killed(path: Path, expected: dict[str, str], seed: int, file: int) -> None:
    """Change the index at random; write every change to the file before it, and "done" after it."""
    rng = random.Random(seed)
    index = reopen(path)
    for number in itertools.count():
        change = change_at_random(rng, expected, f"{seed}.{number}")
        os.write(file, json.dumps(change).encode() + b"\n")
        carry_out(index, *change)
        os.write(file, b"done\n")
        expected = apply(expected, *change)


def holds(path: Path, expected: dict[str, str]) -> bool:
    with reopen(path, read_only=True) as index:
        if [(entry.id, entry.text) for entry in index.entries()] != list(expected.items()):
            return False
        check(index.snapshot(), [Entry(id, text, None) for id, text in expected.items()])
        report = index.verify()
        assert report.ok, report
    return True


def after_a_kill(path: Path, expected: dict[str, str], announced: list[str]) -> dict[str, str]:
    """Return the index's content; it must be all changes that returned, with or without the interrupted one."""
    while len(announced) >= 2 and announced[1] == "done":
        expected = apply(expected, *json.loads(announced[0]))
        announced = announced[2:]
    states = [expected] + [apply(expected, *json.loads(change)) for change in announced]
    found = next((state for state in states if holds(path, state)), None)
    assert found is not None, f"neither before nor after {announced}: {len(expected)} documents expected"
    return found


def killed(work, log: Path, seconds: float | None, announcements: int = 1) -> tuple[list[str], int]:
    """Run work in a child and kill it some seconds after it wrote a number of lines; None lets it end.

    Lines, unlike seconds, do not depend on how busy the machine is. Returns the lines written and the exit status.

    Args:
        work: called with the descriptor of a file to write lines to.
        log: the path of that file.
        seconds: to wait after the lines, before the kill.
        announcements: the number of lines.
    """
    with log.open("wb") as file:
        child = fork(work, file.fileno())
    if seconds is not None:
        begun = time.monotonic()
        while log.read_bytes().count(b"\n") < announcements and time.monotonic() < begun + 30:
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    # what follows the last newline is an unfinished line
    return log.read_text().split("\n")[:-1], status


def kill_at_random_instants(path: Path, kills: int) -> None:
    shards.SHARD_BYTES = 1
    rng = random.Random(1)
    expected: dict[str, str] = {}
    build(path / "index").close()
    changes = 0
    for seed in range(kills):
        work = partial(write_until_killed, path / "index", expected, seed)
        # every change writes a line before and a line after it
        announced, status = killed(work, path / "log", rng.uniform(0.0, 0.04), rng.randrange(1, 6))
        assert os.WIFSIGNALED(status), "the writer failed"
        changes += announced.count("done")
        expected = after_a_kill(path / "index", expected, announced)
        if len(expected) > 1500:
            with reopen(path / "index") as index:
                index.remove(list(expected)[:1300])
            expected = dict(list(expected.items())[1300:])
    assert changes > kills / 2, "writers were killed before they had changed anything worth losing"


def kill_builders(path: Path, kills: int) -> None:
    """Kill the first build of an index repeatedly; it resumes from its last commit."""
    texts = [f"text {i}" + "|x" * (i % 3) for i in range(15 * 1024)]
    rng = random.Random(2)

    def work(file: int) -> None:
        index = create(path / "index")
        os.write(file, b"begun\n")
        index.build(iter(texts))
        os.write(file, b"done\n")

    done = 0
    for _ in range(kills):
        announced, status = killed(work, path / "log", rng.uniform(0.0, 0.25))
        if "done" in announced:
            break
        assert os.WIFSIGNALED(status), "the builder failed"
        with create(path / "index") as index:
            assert done <= len(index), "a commit was lost"
            assert len(index) % 1024 == 0
            done = len(index)
            check(index.snapshot(), [Entry(id, text, None) for id, text in zip(index, texts[:done], strict=True)])
    else:
        with create(path / "index") as index:
            index.build(texts)
    with reopen(path / "index") as index:
        check(index.snapshot(), [Entry(id, text, None) for id, text in zip(index, texts, strict=True)])
        assert index.verify().ok


def kill_at_every_step(path: Path, _: int) -> None:
    """Kill a writer before its n-th call that changes files, for every n, during a fixed list of changes."""
    changes = [
        ("add", ["a", "b"], ["one|two", "three"]),
        # across the end of the first shard
        ("add", [f"n{i}" for i in range(9)], [f"number {i}" for i in range(9)]),
        ("update", ["a", "n5"], ["four", "five|six|seven"]),
        ("remove", ["b", "n7", "o1000"], []),
        ("compact", [], []),
        ("add", ["z"], ["last"]),
    ]
    shards.SHARD_BYTES = 1

    def run(steps: int, target: Path, file: int) -> None:
        left = steps

        def counted(function):
            def call(*arguments, **options):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        for name in ("pwrite", "fsync", "ftruncate", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        catalogue.Catalogue.write = counted(catalogue.Catalogue.write)
        index = reopen(target)
        for change in changes:
            os.write(file, json.dumps(change).encode() + b"\n")
            carry_out(index, *change)
            os.write(file, b"done\n")

    old = {f"o{i}": f"old {i}" for i in range(1018)}
    build(path / "base", old.values(), old).close()
    for steps in itertools.count():
        target = path / str(steps)
        shutil.copytree(path / "base", target)
        announced, status = killed(partial(run, steps, target), path / "log", None)
        after_a_kill(target, old, announced)
        # the next writer can write
        with reopen(target) as index:
            index.add(["next"], ["next"])
            assert index.verify().ok
        assert len(list(target.glob("generation-*"))) == 1
        if not os.WIFSIGNALED(status):
            assert status == 0, "the writer failed"
            assert announced.count("done") == len(changes)
            return


def write_groups(path: Path, seconds: float) -> None:
    """Add, update and remove whole groups, one transaction each, and compact sometimes."""
    rng = random.Random(3)
    groups: list[int] = []
    stop = time.monotonic() + seconds
    number = 0
    with reopen(path) as index:
        while time.monotonic() < stop:
            number += 1
            kind = rng.choices(["add", "update", "remove", "compact"], [5, 4, 4, 1])[0]
            if kind == "compact":
                index.compact()
                continue
            if kind == "add" or not groups:
                kind, group = "add", number
                groups.append(group)
            else:
                group = rng.choice(groups)
            ids = [f"{group}-{member}" for member in range(GROUP)]
            if kind == "remove":
                groups.remove(group)
                index.remove(ids)
            else:
                getattr(index, kind)([f"{id} at {number}" + "|x" * (number % 3) for id in ids], ids)
            if len(groups) > 300:
                index.remove([f"{group}-{member}" for group in groups[:200] for member in range(GROUP)])
                del groups[:200]


def read_groups(path: Path, seconds: float, seed: int) -> None:
    """Assert that every view holds whole groups, each of one version, and rows that match its texts."""
    rng = random.Random(seed)
    stop = time.monotonic() + seconds
    old, seen = None, set()
    index = reopen(path, read_only=True)
    while time.monotonic() < stop:
        if rng.random() < 0.2:
            index.close()
            index = reopen(path, read_only=True)
        view = index.snapshot()
        ids, texts = list(view), view.texts(range(len(view)))
        versions: dict[str, list[str]] = {}
        for id, text in zip(ids, texts, strict=True):
            assert text.startswith(f"{id} at "), f"{id} has another document's text: {text}"
            versions.setdefault(id.split("-")[0], []).append(text.split(" at ")[1])
        assert all(len(found) == GROUP and len(set(found)) == 1 for found in versions.values()), versions
        check(view, [Entry(id, text, None) for id, text in zip(ids, texts, strict=True)], size=97)
        seen.add(tuple(texts[-GROUP:]))
        if old is not None:
            check(*old)
        if old is None or rng.random() < 0.1:
            old = view, list(view.entries())
    assert len(seen) > 3, "the reader saw hardly any change"


def write_beside_readers(path: Path, seconds: int) -> None:
    build(path / "index").close()
    children = [fork(write_groups, path / "index", seconds)]
    children += [fork(read_groups, path / "index", seconds, seed) for seed in range(2)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert statuses == [0, 0, 0]
    with reopen(path / "index") as index:
        assert index.verify().ok


def write_while_the_lock_is_removed(path: Path, seconds: int) -> None:
    """Add from three processes while the lock file is deleted repeatedly; all additions that returned stay."""
    build(path / "index").close()
    stop = time.monotonic() + seconds

    def add(writer: int, log: Path) -> None:
        acknowledged = []
        index = reopen(path / "index")
        while time.monotonic() < stop:
            ids = [f"{writer}-{len(acknowledged)}-{member}" for member in range(GROUP)]
            try:
                # slow, so that another writer could interfere if the lock failed
                index.add(slowly(ids), ids)
                acknowledged += ids
            except IndexLockedError:
                time.sleep(0.001)
        log.write_text("\n".join(acknowledged))

    def slowly(ids: list[str]) -> Iterator[str]:
        for id in ids:
            time.sleep(0.001)
            yield f"text {id}"

    logs = [path / f"log {writer}" for writer in range(3)]
    children = [fork(add, writer, log) for writer, log in enumerate(logs)]
    removed = 0
    while time.monotonic() < stop:
        (path / "index" / "lock").unlink(missing_ok=True)
        removed += 1
        time.sleep(0.003)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    acknowledged = {id for log in logs for id in log.read_text().split()}
    assert removed > 20
    assert len(acknowledged) > 5 * GROUP
    with reopen(path / "index") as index:
        assert index.verify().ok
        assert set(index) == acknowledged
        check(index.snapshot(), [Entry(id, f"text {id}", None) for id in index])


def upgrade_until_killed(path: Path, _: int) -> None:
    """Kill the first writer to an index of format 1 before its n-th call that changes files, for every n."""
    held = {f"o{i}": f"old {i}" for i in range(3000)}
    build(path / "base", held.values(), held).close()
    with reopen(path / "base") as index:
        index.remove(["o1", "o2000"])
    as_format_1(path / "base")
    for steps in itertools.count():
        target = path / str(steps)
        shutil.copytree(path / "base", target)

        def run(file: int, target: Path = target, left: list[int] = [steps]) -> None:  # noqa: B006
            def counted(function):
                def call(*arguments, **options):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments, **options)

                return call

            for name in ("pwrite", "fsync", "ftruncate", "replace", "unlink"):
                setattr(os, name, counted(getattr(os, name)))
            for name in ("write", "_put_blocks"):
                setattr(catalogue.Catalogue, name, counted(getattr(catalogue.Catalogue, name)))
            reopen(target).remove("o5")

        _, status = killed(run, path / "log", None)
        after = {id: text for id, text in held.items() if id not in ("o1", "o2000")}
        without = {id: text for id, text in after.items() if id != "o5"}
        assert holds(target, after) or holds(target, without)
        with reopen(target) as index:
            index.add(["next"], ["next"])
            report = index.verify()
            assert (report.ok, report.unsummed) == (True, False)
        if not os.WIFSIGNALED(status):
            assert status == 0
            assert steps > 5
            return


def leave_a_hot_journal(path: Path, _: int) -> None:
    """Kill a writer after SQLite has overwritten pages of the catalogue and before the commit."""
    with build(path / "index", [f"text {i}" for i in range(3000)]) as index:
        expected = list(index.entries())

    def work(file: int) -> None:
        index = reopen(path / "index")
        store = index._newest.store()
        with store.lock():
            connection = store.current().writer()._connection
            connection.execute("PRAGMA cache_size=1")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("UPDATE entries SET text = 'half-written'")
            connection.execute("UPDATE blocks SET live = x'00'")
            os.write(file, b"done\n")
            time.sleep(60)

    with reopen(path / "index", read_only=True) as early:
        early.snapshot()
        announced, _ = killed(work, path / "log", 1.0)
        assert announced == ["done"]
        journal = next((path / "index").glob("generation-*/*-journal"))
        assert journal.stat().st_size > 0
        # an index that was open before, and one opened now
        for index in (early, reopen(path / "index", read_only=True)):
            check(index.snapshot(), expected)


def read_without_permission(_: Path, __: int) -> None:
    """Open, read and verify an index in a folder without write permission; nothing there changes."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "index")
        with build(path, [f"text {i}" for i in range(2000)]) as index:
            expected = list(index.entries())
        folders = [path, next(path.glob("generation-*"))]
        Path(place).chmod(0o755)
        for item in [*path.rglob("*"), path]:
            item.chmod(0o555 if item.is_dir() else 0o444)

        def state() -> dict[str, tuple[int, int]]:
            return {str(item): (item.stat().st_size, item.stat().st_mtime_ns) for item in [path, *path.rglob("*")]}

        def work(_: int) -> None:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            index = reopen(path)
            check(index.snapshot(), expected)
            assert index.verify().ok
            for change in (lambda: index.add(["more"]), lambda: index.remove(next(iter(index))), index.compact):
                with pytest.raises(IndexStorageError, match=str(path)):
                    change()
            check(index.snapshot(), expected)

        before = state()
        _, status = killed(work, Path(place, "log"), None)
        assert status == 0
        assert state() == before
        for item in folders:
            item.chmod(0o755)


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenario, folder, number = sys.argv[1:]
    Path(folder).mkdir(exist_ok=True)
    globals()[scenario](Path(folder), int(number))
