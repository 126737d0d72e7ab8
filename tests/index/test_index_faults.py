"""Killed writers and concurrent processes: nothing that was committed is lost or changed.

The processes are in index_processes.py. MIXENCODER_TEST_SECONDS lengthens the run of readers beside a writer.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SECONDS = os.environ.get("MIXENCODER_TEST_SECONDS", "3")


@pytest.mark.parametrize(
    ("scenario", "number"),
    [
        pytest.param("kill_at_random_instants", "120", id="120 writers killed at random instants lose nothing"),
        pytest.param("kill_builders", "25", id="a build that is killed 25 times ends as if never killed"),
        pytest.param("kill_at_every_step", "0", id="a writer killed before any single write loses nothing"),
        pytest.param("upgrade_until_killed", "0", id="an upgrade killed at any step loses nothing"),
        pytest.param(
            "write_while_the_lock_is_removed", SECONDS, id="a lock file that is deleted admits no second writer"
        ),
        pytest.param("leave_a_hot_journal", "0", id="the next reader undoes a commit that SQLite did not finish"),
        pytest.param("read_without_permission", "0", id="an index in a read-only folder is read and not changed"),
        pytest.param("write_beside_readers", SECONDS, id="readers beside a writer see whole transactions"),
    ],
)
def test_committed_documents_survive_and_no_others_appear(scenario, number, tmp_path):
    command = [sys.executable, str(TESTS / "index_processes.py"), scenario, str(tmp_path / "place"), number]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
