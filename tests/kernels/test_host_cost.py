"""What a call of a known form costs the host, as a multiple of PyTorch's own attention on the same tiny tensors."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="module")
def costs() -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.measuring.host_cost"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "operator", ["candidate_attention", "residual_layer_norm", "gate_layer_norm", "score_candidates"]
)
def test_a_call_of_a_known_form_costs_the_host_little_more_than_pytorch_s_own(costs, operator):
    # 1.02 to 1.28 for candidate_attention in eight runs, below 1 for the others; the long way takes much longer
    assert costs[operator] <= 1.75 * costs["sdpa"], costs
