"""Recording everything by one command, with the measurements themselves left out."""

import argparse
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.measuring.machine import machine_facts
from benchmarks.suite.case import RECORD_KEYS


@pytest.fixture(autouse=True)
def facts(monkeypatch):
    """Look at this machine before a test replaces `subprocess.run`, which the look may need."""
    found = machine_facts()
    monkeypatch.setattr(record, "machine_facts", lambda: found)


@pytest.mark.parametrize("name", record.MEASUREMENTS)
def test_what_stands_alone_is_a_module_that_exists_and_waits_for_its_data(name):
    options = argparse.Namespace(device="here", beir_folder=Path("scifact"), backbone=Path("minilm"))
    dash, module, *arguments = record.measurement_command(name, options)
    assert dash == "-m"
    assert importlib.util.find_spec(module)
    assert "here" in arguments
    without = argparse.Namespace(device="here", beir_folder=None, backbone=None)
    assert (record.measurement_command(name, without) is None) == (name in record.NEEDED)


def test_a_failed_run_leaves_the_file_and_is_told(monkeypatch, capsys):
    monkeypatch.setattr(record.subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 1))
    monkeypatch.setattr(record, "write_results", lambda *arguments: pytest.fail("nothing may be written"))
    assert record.main(["--device", "here", "--only", "layers"]) == 1
    assert "layers: pytest ended with 1" in capsys.readouterr().out


def entry(backend, **changes):
    case = {"group": "layers", "operator": "gate", "variant": "", "shape": {"N": 1}, "dtype": "float32"}
    return {**case, "backend": backend, **changes}


@pytest.mark.parametrize("kept", [1, 0])
def test_what_stayed_noisy_is_listed_and_the_rest_is_kept(kept, monkeypatch, capsys):
    costs = {"flops": 1, "bytes": 1, "exps": 1, "seconds": 1.0, "facts": {}}
    good = dict.fromkeys(RECORD_KEYS) | entry("torch") | costs
    document = {
        "machine_info": {"facts": {}, "peaks": {"float32": {"flops": 9.0, "bytes": 9.0, "exps": 9.0}}},
        "datetime": "now",
        "skipped": [entry("sdpa", reason="refused after 3 tries", refused=True), entry("flex", reason="no compiler")],
        "benchmarks": [{"extra_info": good}] * kept,
    }
    written = []

    def suite(command, **options):
        Path(command[-1].partition("=")[2]).write_text(json.dumps(document))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(record.subprocess, "run", suite)
    monkeypatch.setattr(record, "write_results", lambda device, group, found: written.append(len(found.records)))
    assert record.main(["--device", "here", "--only", "layers"]) == 1
    said = capsys.readouterr().out
    assert f"layers: {kept} records; without:\n  gate N=1 float32: sdpa: refused after 3 tries" in said
    assert "flex" not in said
    # a file of nothing is not written over one of something
    assert written == [1] * kept


def test_a_folder_takes_no_records_of_another_kind_of_machine(monkeypatch, capsys):
    monkeypatch.setattr(record.subprocess, "run", lambda *arguments, **options: pytest.fail("nothing may be measured"))
    monkeypatch.setattr(record, "machine_facts", lambda: {"kind": "cpu", "model": "made up"})
    with pytest.raises(SystemExit):
        record.main(["--device", "cpu-zen3-2-threads"])
    assert "holds records of another kind of machine: " in capsys.readouterr().err
