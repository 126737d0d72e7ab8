"""The rivals of the benchmark compute the same thing: none is crippled, none is wrong."""

import pytest
import torch

from benchmarks.measuring.formulations import RIVALS, Inputs, expand, sdpa_on_expanded
from benchmarks.measuring.timing import peak_bytes
from tests.kernels.attention_oracle import attention_by_loops

EAGER = [name for name in RIVALS if "compiled" not in name]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", [*EAGER, "sdpa-pre-expanded"])
def test_a_rival_computes_candidate_attention(name, k):
    inputs = Inputs.random(7, k, 5, 2, 16, torch.float64)
    if name == "sdpa-pre-expanded":
        context, state = sdpa_on_expanded(inputs, *expand(inputs))
    else:
        context, state = RIVALS[name](inputs)
    want = attention_by_loops(
        inputs.context_query,
        inputs.context_key,
        inputs.context_value,
        inputs.state_query,
        inputs.key.unsqueeze(0),
        inputs.value.unsqueeze(0),
    )
    torch.testing.assert_close(context, want[0][0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, want[1][0], rtol=1e-10, atol=1e-10)


def test_peak_bytes_counts_what_is_held_at_once():
    def call() -> torch.Tensor:
        first = torch.ones(1000)
        del first
        return torch.ones(2000) + torch.ones(2000)

    # two inputs and the sum
    assert 3 * 8000 <= peak_bytes(call) <= 3 * 8000 + 4000
