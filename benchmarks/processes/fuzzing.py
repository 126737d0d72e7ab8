"""Requests made up from the server's OpenAPI page, right and wrong ones, to every endpoint of `mixencoder serve`.

``python -m benchmarks.processes.fuzzing --device cpu-zen3-2-threads --requests 500``

schemathesis makes the requests (extra ``test``). Every answer must be one that the page documents, in status, content
type and shape, within `SECONDS`, and never a 5xx; otherwise the run ends with the request that shows it. Afterwards the
server must still give the answer of before, and its index, which the requests changed, must be whole. Writes
benchmarks/results/DEVICE/fuzzing.json: requests and answers of every endpoint by status, and the slowest answer.
"""

import argparse
import json
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.measuring.machine import kind_name, machine_facts
from benchmarks.measuring.provenance import commit, versions, write_json
from benchmarks.processes.serving import Load, servers
from benchmarks.suite.results import RESULTS
from mixencoder import MixEncoder
from mixencoder.cli.demo import ANSWERS
from mixencoder.data.candidates import read_candidates

SECONDS = 30
"""Longest time of an answer."""
QUERY = "How do I undo my last commit?"


def operations(address: str) -> dict[str, Any]:
    """Return {"METHOD /path": schemathesis' operation} of a running server."""
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


def fuzz(operation: Any, requests: int) -> dict[str, Any]:
    """Send up to `requests` right requests to an endpoint, and as many wrong ones if it takes a body.

    Returns:
        "requests", "statuses" ({status: answers}) and "slowest_seconds".

    Raises:
        Exception: an answer is not documented, is a 5xx or did not come within `SECONDS`; schemathesis or the HTTP
            client names the request.
    """
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis import checks
    from schemathesis.specs.openapi import checks as conformance

    wanted = [
        checks.not_a_server_error,
        conformance.status_code_conformance,
        conformance.content_type_conformance,
        conformance.response_schema_conformance,
    ]
    modes = [schemathesis.GenerationMode.POSITIVE]
    if operation.body:
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    statuses: Counter[str] = Counter()
    slowest = 0.0

    def ask(case: Any) -> None:
        nonlocal slowest
        start = time.perf_counter()
        response = case.call(timeout=SECONDS)
        slowest = max(slowest, time.perf_counter() - start)
        statuses[str(response.status_code)] += 1
        case.validate_response(response, checks=wanted)

    for mode in modes:
        made = given(case=operation.as_strategy(generation_mode=mode))
        limits = settings(max_examples=requests, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        limits(made(ask))()
    return {"requests": statuses.total(), "statuses": dict(sorted(statuses.items())), "slowest_seconds": slowest}


def _ranking(address: str, texts: Sequence[str]) -> Any:
    body = json.dumps({"query": QUERY, "texts": texts}).encode()
    request = urllib.request.Request(f"{address}/rerank", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)


def run(device: str, requests: int, arguments: Sequence[str]) -> None:
    """Fuzz a server of the bundled model whose index may be written, and write the record.

    Raises:
        RuntimeError: the server's answer differs after the requests, or its index is damaged.
    """
    engine, texts = MixEncoder.from_pretrained(), read_candidates(str(ANSWERS)).texts
    records = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index")
        engine.index(texts, path=path, show_progress_bar=False).close()
        started, begin = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        with servers(Load(), ["--index", str(path), "--allow-writes"]) as [(address, _)]:
            before = _ranking(address, texts)
            for name, operation in operations(address).items():
                records[name] = fuzz(operation, requests)
                print(name, records[name])
            if _ranking(address, texts) != before:
                raise RuntimeError("the server ranks the same texts differently after the made-up requests")
        with engine.open_index(path, read_only=True) as index:
            if not (report := index.verify()).ok:
                raise RuntimeError(f"the index is damaged after the made-up requests: {report}")
    document = {
        "machine": machine_facts(),
        "command": " ".join(["python -m benchmarks.processes.fuzzing", *arguments]),
        "started": started,
        "wall_seconds": time.perf_counter() - begin,
        "commit": commit(),
        "versions": versions(),
        "records": records,
    }
    write_json(RESULTS / device / "fuzzing.json", document)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes.fuzzing", description=__doc__)
    parser.add_argument("--device", help="name of the folder of results (default: named after this kind of machine)")
    parser.add_argument("--requests", type=int, default=500, help="right and wrong requests to each endpoint, of each")
    options = parser.parse_args(arguments)
    run(options.device or kind_name(machine_facts()), options.requests, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
