"""The benchmark of the command line's start: what it records, with processes that cost nothing."""

import json

from benchmarks.processes import startup


def test_it_records_medians_of_turns_without_the_first_and_their_ratios(tmp_path, monkeypatch):
    seconds = {
        name: iter([100.0, base, 3 * base, 2 * base]) for name, base in zip(startup.COMMANDS, (6, 3, 4), strict=True)
    }
    names = {tuple(arguments): name for name, arguments in startup.COMMANDS.items()}
    monkeypatch.setattr(startup, "seconds_of", lambda arguments: next(seconds[names[tuple(arguments)]]))
    monkeypatch.setattr(startup, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results" / "here").mkdir(parents=True)
    startup.main(["--device", "here", "--rounds", "3"])
    record = json.loads((tmp_path / "benchmarks" / "results" / "here" / "startup.json").read_text())
    assert record["seconds"] == {startup.RANK: 12, startup.LIBRARIES: 6, startup.MODEL: 8}
    assert record["ratios"] == {
        f"{startup.RANK} / {startup.LIBRARIES}": 2,
        f"{startup.RANK} / {startup.MODEL}": 1.5,
    }
    assert len(record["samples"][startup.RANK]) == 3
