"""Crashes while a checkpoint is written: the last good one is never lost, and a mix is never read.

The processes are in checkpoint_processes.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param("save_over_another", id="a save over a checkpoint may be killed before every single change"),
        pytest.param("save_where_nothing_was", id="a new checkpoint is there whole or not at all"),
        pytest.param("train_until_killed", id="a run killed anywhere goes on to the weights of one that was not"),
    ],
)
def test_a_checkpoint_is_the_old_one_or_the_new_one(scenario, backbone_path, tmp_path):
    command = [sys.executable, str(TESTS / "checkpoint_processes.py"), scenario, str(tmp_path), str(backbone_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parents[1])}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
