"""Ray on this machine for tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

CORES = 8
"""Of the Ray that tests start, whatever the machine has."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Run Ray on this machine; without Ray the test is skipped."""
    ray = pytest.importorskip("ray", reason="ray is not installed; .ci/integrations installs it")
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch)
        ray.init(num_cpus=CORES, include_dashboard=False, object_store_memory=2**27, configure_logging=False)
        yield
        ray.shutdown()


def set_environment(patch: pytest.MonkeyPatch) -> None:
    """Set what Ray's processes must inherit: no report to Ray's makers, and this checkout."""
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # a machine that is busy with other tests takes longer than five seconds to start Serve's proxy
    patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
