"""Every test starts without plans: tests replace kernels, rules and switches that plans follow."""

import pytest

from mixkernels import plans


@pytest.fixture(autouse=True)
def no_plans():
    plans.clear()
    yield
    plans.clear()
