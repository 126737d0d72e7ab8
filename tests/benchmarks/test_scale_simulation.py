"""The simulation of many machines, against what can be computed by hand, and its command."""

import json

import numpy as np
import pytest

from benchmarks.report import billion_tables
from benchmarks.scale import record as scale_record
from benchmarks.scale import simulation
from benchmarks.scale.figures import encoding_rate, read_figures
from benchmarks.scale.simulation import Cluster, simulate

STEADY = {"spread": 0.0, "hop_seconds": 0.01}


def test_without_load_a_query_takes_its_two_steps():
    outcome = simulate(Cluster(7, 0.3, 0.1, query_seconds=0.05, **STEADY), 0.001, 100)
    assert np.allclose(outcome.seconds, 0.05 + 0.3 + 0.1 + 2 * 0.01)
    assert not outcome.partial
    assert len(outcome.seconds) == 90


def test_waiting_is_that_of_a_queue_with_constant_service():
    """In an M/D/1 queue the mean time is T = s + load s / (2 (1 - load)), by Pollaczek and Khinchine's formula.

    The second call, of no length, then waits for the calls that arrived meanwhile: rate T of them, by Little's law.
    """
    service, load = 0.2, 0.6
    cluster = Cluster(1, service, 0.0, spread=0.0, hop_seconds=0.0)
    outcome = simulate(cluster, load / service, 30_000)
    first = service + load * service / (2 * (1 - load))
    assert outcome.seconds.mean() == pytest.approx(first * (1 + load), rel=0.03)
    assert outcome.busy == pytest.approx(load, rel=0.02)


def test_the_slowest_shard_decides():
    """Without load the time of the first step is the largest of n lognormal times."""
    shards, spread = 50, 0.4
    outcome = simulate(Cluster(shards, 1.0, 0.0, spread=spread, hop_seconds=0.0), 1e-4, 4000)
    drawn = np.exp(spread * np.random.default_rng(1).standard_normal((4000, shards))).max(axis=1)
    for percent in (50, 95):
        assert outcome.percentile(percent) == pytest.approx(np.percentile(drawn, percent), rel=0.05)


def test_a_replica_takes_over_when_machines_fail():
    failing = {**STEADY, "failures_per_day": 2000.0, "restart_seconds": 5.0, "retry_seconds": 0.5}
    alone = simulate(Cluster(3, 0.3, 0.1, **failing), 0.2, 5000)
    twice = simulate(Cluster(3, 0.3, 0.1, replicas=2, **failing), 0.2, 5000)
    # a failed machine makes every query wait for its restart; a second replica answers at once, or after a lost call
    assert alone.percentile(99) > 4
    assert twice.percentile(95) < 0.3 + 0.1 + 0.02 + 0.3 + 0.5 + 0.01
    assert (alone.seconds > 2).mean() > 5 * (twice.seconds > 2).mean()


def test_lost_calls_are_sent_again():
    """With one machine and no queue, a query that meets a failure takes longer by the restart at most, and is whole."""
    cluster = Cluster(
        1, 1.0, 0.0, spread=0.0, hop_seconds=0.0, failures_per_day=4320.0, restart_seconds=3.0, retry_seconds=0.1
    )
    outcome = simulate(cluster, 1e-3, 2000)
    assert not outcome.partial
    whole = outcome.seconds
    assert whole.min() == pytest.approx(1.0)
    # 20 s between failures: about one query in twenty loses its call, others find the machine restarting
    assert 0.05 < (whole > 1.001).mean() < 0.35


def test_a_deadline_bounds_the_time_and_counts_what_is_missing():
    cluster = Cluster(3, 0.3, 0.1, **STEADY, failures_per_day=2000.0, restart_seconds=30.0)
    outcome = simulate(cluster, 0.2, 3000, deadline=0.5)
    assert outcome.seconds.max() <= 2 * 0.5 + 1e-9
    assert 0 < outcome.partial < 1
    assert outcome.missing.max() <= 2 * cluster.shards
    assert not simulate(Cluster(3, 0.3, 0.1, **STEADY), 0.001, 100, deadline=0.5).partial


def test_the_same_seed_gives_the_same_outcome():
    cluster = Cluster(5, 0.1, 0.05, replicas=2, failures_per_day=500.0)
    first, again = (simulate(cluster, 3.0, 1000, seed=7) for _ in range(2))
    assert np.array_equal(first.seconds, again.seconds)
    assert not np.array_equal(first.seconds, simulate(cluster, 3.0, 1000, seed=8).seconds)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"shards": 0}, "shards is 0"), ({"spread": -1.0}, "spread is -1"), ({"restart_seconds": float("nan")}, "nan")],
)
def test_impossible_clusters_are_errors(changed, named):
    with pytest.raises(ValueError, match=named):
        Cluster(**{"shards": 2, "first_seconds": 0.1, "second_seconds": 0.1, **changed})


@pytest.mark.parametrize("given", [{"rate": 0.0}, {"deadline": 0.0}, {"queries": 3}, {"rate": float("nan")}])
def test_impossible_loads_are_errors(given):
    with pytest.raises(ValueError, match="expected a positive rate"):
        simulate(Cluster(1, 0.1, 0.1), **{"rate": 1.0, "queries": 100, **given})


def test_the_command_prints_percentiles(capsys):
    options = ["--shards", "4", "--documents", "100000", "--queries", "200", "--failures", "1", "--deadline", "2"]
    assert simulation.main(options) == 0
    printed = capsys.readouterr().out
    assert "4 shards of 100,000" in printed
    assert "p99.9" in printed
    with pytest.raises(SystemExit, match="2"):
        simulation.main([*options, "--replicas", "0"])


def test_figures_are_those_of_the_records():
    figures = read_figures()
    for documents, seconds in figures.prefiltered.items():
        if documents >= 100_000:
            # the sum of the stages is the measured whole, or near it where other records were read
            assert figures.seconds(documents) == pytest.approx(seconds, rel=0.05)
    assert 0 < figures.dual_per_document < 1e-6


def test_a_record_is_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr(scale_record, "RESULTS", tmp_path)
    monkeypatch.setattr(scale_record, "SCENARIOS", scale_record.SCENARIOS[:1])
    monkeypatch.setattr(scale_record, "QUERIES", 50)
    figures, device = read_figures(), billion_tables.DEVICE
    monkeypatch.setattr(scale_record, "read_figures", lambda folder: figures)
    monkeypatch.setattr(scale_record, "run", lambda scenario, figures: _few(scenario, figures))
    assert scale_record.main(["--device", device]) == 0
    document = json.loads((tmp_path / device / "scale_simulation.json").read_text())
    assert document["records"][0]["cluster"]["shards"] == 1000
    monkeypatch.setattr(billion_tables, "RESULTS", tmp_path)
    assert "| dual scores | 1,000,000 | 1 | 1,000 |" in billion_tables.scale_simulation_table()


def _few(scenario, figures):
    return scale_record_run(scenario, figures, queries=50)


scale_record_run = scale_record.run


def test_the_rate_of_encoding_is_that_of_the_plain_build(tmp_path):
    assert encoding_rate(tmp_path) is None
    (tmp_path / "ray_build.json").write_text(json.dumps({"stages": {"plain": {"documents": 500, "seconds": 5.0}}}))
    assert encoding_rate(tmp_path) == 100
