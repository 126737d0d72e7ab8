"""Record simulated clusters of a billion candidates: ``python -m benchmarks.scale.record --device NAME``.

Needs the records ``index_speed`` and ``index_million`` of the machine. Times nothing; the same commit gives the same
record. Writes benchmarks/results/DEVICE/scale_simulation.json.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measuring.provenance import commit, write_json
from benchmarks.scale.figures import Figures, read_figures
from benchmarks.scale.simulation import PERCENTILES, Cluster, simulate
from benchmarks.suite.results import RESULTS

CANDIDATES = 1_000_000_000
QUERIES = 10_000
ASSUMED_FIRST_STAGE = 0.010
"""Seconds of a vector index over one shard; an assumption."""
FAILURES_PER_DAY = 0.1
"""Of one machine; an assumption, far above what is usual, so that the simulated hours have some."""


class Scenario(NamedTuple):
    """One row of the table."""

    documents: int
    """Of each shard."""
    rate: float
    """Queries in a second."""
    replicas: int = 1
    failures_per_day: float = 0.0
    deadline: float | None = None
    vector_index: bool = False
    """Whether a vector index replaces the dual scores of all documents."""
    spread: float = 0.2


SCENARIOS = (
    Scenario(1_000_000, 0.3),
    Scenario(1_000_000, 1.0),
    Scenario(1_000_000, 1.0, spread=0.5),
    Scenario(1_000_000, 1.0, failures_per_day=FAILURES_PER_DAY),
    Scenario(1_000_000, 1.0, failures_per_day=FAILURES_PER_DAY, deadline=1.0),
    Scenario(1_000_000, 1.0, 2, failures_per_day=FAILURES_PER_DAY),
    Scenario(1_000_000, 1.0, 3, failures_per_day=FAILURES_PER_DAY),
    Scenario(10_000_000, 0.1),
    Scenario(1_000_000, 10.0, 2, failures_per_day=FAILURES_PER_DAY, vector_index=True),
    Scenario(10_000_000, 10.0, 2, failures_per_day=FAILURES_PER_DAY, vector_index=True),
)


def cluster_of(scenario: Scenario, figures: Figures) -> Cluster:
    """Return the machines of a scenario."""
    dual = ASSUMED_FIRST_STAGE if scenario.vector_index else scenario.documents * figures.dual_per_document
    return Cluster(
        CANDIDATES // scenario.documents,
        dual,
        figures.interaction,
        replicas=scenario.replicas,
        query_seconds=figures.query,
        spread=scenario.spread,
        failures_per_day=scenario.failures_per_day,
    )


def run(scenario: Scenario, figures: Figures, queries: int = QUERIES) -> dict[str, Any]:
    """Simulate a scenario and return its record."""
    cluster = cluster_of(scenario, figures)
    outcome = simulate(cluster, scenario.rate, queries, deadline=scenario.deadline)
    return {
        **scenario._asdict(),
        "cluster": asdict(cluster),
        "queries": queries,
        "seconds": {f"p{percent:g}": outcome.percentile(percent) for percent in PERCENTILES},
        "partial": outcome.partial,
        "busy": outcome.busy,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.record", description=__doc__)
    parser.add_argument("--device", required=True, help="name of the folder of results that are read and written")
    options = parser.parse_args(arguments)
    folder: Path = RESULTS / options.device
    figures = read_figures(folder)
    records = []
    for scenario in SCENARIOS:
        records.append(run(scenario, figures))
        print(records[-1], flush=True)
    document = {
        "command": f"python -m benchmarks.scale.record --device {options.device}",
        "commit": commit(),
        "figures_of": list(figures.commits),
        "numpy": np.__version__,
        "records": records,
    }
    write_json(folder / "scale_simulation.json", document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
