"""Starting Ray on this machine: actors that hold cores leave some for others. Needs no Ray."""

import os
import sys
from types import ModuleType

import pytest

from mixencoder.distributed.ray_build import start_ray


@pytest.fixture
def started(monkeypatch):
    """What a stand-in for Ray was started with."""
    calls = []
    ray, data = ModuleType("ray"), ModuleType("ray.data")
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(calls), raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options), raising=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return calls


def test_held_cores_are_added_to_those_of_the_machine(started):
    start_ray(held_cores=5)
    assert started[0]["num_cpus"] == os.cpu_count() + 5
    # a cluster that runs is taken as it is
    start_ray(held_cores=50)
    assert len(started) == 1


def test_a_cluster_at_an_address_counts_its_own_cores(started):
    start_ray("auto", held_cores=5)
    assert started[0]["address"] == "auto"
    assert "num_cpus" not in started[0]
