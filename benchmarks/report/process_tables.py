"""Tables of whole processes and their threads: start-up, and encoding next to busy processes."""

import json
import re
from typing import Any

from benchmarks.measuring.markdown import markdown
from benchmarks.suite.results import RESULTS

DEVICE = "cpu-emerald-rapids-2-threads"
_MOVED = {
    "benchmarks.startup": "benchmarks.processes.startup",
    "benchmarks.threads": "benchmarks.processes.threads",
}
"""Modules that moved after a record was made -> their names now: a page shows a command that works."""


def threads_table() -> str:
    """Encoding with one and two threads, alone and next to busy processes, and ranking raw texts against a rival."""
    document = _record("threads")
    texts = document["texts"]
    rows = [["what", "threads", "busy processes", "seconds", "rival", "rival's time"], ["---"] * 6]
    for record in document["records"]:
        (ours, seconds), *rivals = record["seconds"].items()
        count = texts["encoded" if record["what"] == "encoding" else "ranked"]
        line = [f"`{ours}`, {count} texts", str(record["threads"]), str(record["busy processes"]), f"{seconds:.2f}"]
        rows.append([*line, *(rivals[0][0], f"{record['ratio']:.2f}x")] if rivals else [*line, "", ""])
    return f"{markdown(rows)}\n\n{_provenance(document)}"


def startup_table() -> str:
    """Whole processes, from start to end."""
    document = _record("startup")
    rows = [["process", "seconds"], ["---"] * 2]
    rows += [[name, f"{seconds:.2f}"] for name, seconds in document["seconds"].items()]
    rows += [[name, f"{ratio:.2f}x"] for name, ratio in document["ratios"].items()]
    return f"{markdown(rows)}\n\n{_provenance(document)}"


def serving_table() -> str:
    """Throughput and times of one server with two threads, by what requests hold."""
    rows = [["requests hold", "requests", "per second", "p50", "p95", "p99", "wrong", "memory, before and after"]]
    rows.append(["---"] * len(rows[0]))
    found = [record for record in _serving_records() if (record["servers"], record["threads"]) == (1, 2)]
    for record in found:
        times = [f"{1000 * seconds:,.0f} ms" for seconds in record["seconds"].values()]
        memory = f"{record['memory_mib']['before']:,} MiB, {record['memory_mib']['after']:,} MiB"
        counts = [f"{record['requests']:,}", f"{record['requests_per_second']:.1f}"]
        rows.append([_NAMES_OF_LOADS[record["what"]], *counts, *times, str(record["wrong"]), memory])
    return _with_commands(rows, found)


def serving_threads_table() -> str:
    """Throughput and times of rankings by id, by servers and threads of each."""
    rows = [["servers", "threads of each", "requests", "per second", "p50", "p99", "memory of all"]]
    rows.append(["---"] * len(rows[0]))
    found = [record for record in _serving_records() if record["what"] == "ids"]
    for record in sorted(found, key=lambda record: (record["servers"], record["threads"])):
        times = [f"{1000 * record['seconds'][name]:,.0f} ms" for name in ("p50", "p99")]
        counts = [str(record["servers"]), str(record["threads"]), f"{record['requests']:,}"]
        rows.append([*counts, f"{record['requests_per_second']:.1f}", *times, f"{record['memory_mib']['after']:,} MiB"])
    return _with_commands(rows, found)


def fuzzing_table() -> str:
    """Made-up requests to every endpoint of the server, and its answers by status."""
    path = RESULTS / DEVICE / "fuzzing.json"
    if not path.exists():
        return "Not recorded yet: `python -m benchmarks.processes.fuzzing` does it."
    found = json.loads(path.read_text(encoding="utf-8"))
    statuses = sorted({status for record in found["records"].values() for status in record["statuses"]})
    rows = [["endpoint", "requests", *(f"answered {status}" for status in statuses), "slowest"]]
    rows.append(["---"] * len(rows[0]))
    for endpoint, record in sorted(found["records"].items(), key=lambda item: item[0].split()[::-1]):
        counts = [f"{record['statuses'].get(status, 0):,}" for status in statuses]
        slowest = f"{1000 * record['slowest_seconds']:,.0f} ms"
        rows.append([f"`{endpoint}`", f"{record['requests']:,}", *counts, slowest])
    total = sum(record["requests"] for record in found["records"].values())
    return (
        f"{markdown(rows)}\n\n{total:,} requests in {found['wall_seconds'] / 60:.0f} minutes; {DEVICE}, beside other "
        f"work; `{found['command']}`; commit {found['commit'][:7]}"
    )


_NAMES_OF_LOADS = {"ids": "ids", "texts": "texts", "cross-encoder": "texts, to the cross-encoder"}


def _serving_records() -> list[dict[str, Any]]:
    path = RESULTS / DEVICE / "serving.json"
    return json.loads(path.read_text(encoding="utf-8"))["records"] if path.exists() else []


def _with_commands(rows: list[list[str]], records: list[dict[str, Any]]) -> str:
    if not records:
        return "Not recorded yet: `python -m benchmarks.processes.serving` does it."
    commits = ", ".join(dict.fromkeys(record["commit"][:7] for record in records))
    command = re.sub(r" --folder \S+", "", records[0]["command"])
    torch = records[0]["versions"]["torch"]
    return f"{markdown(rows)}\n\n{DEVICE}, PyTorch {torch}; such as `{command}`; commit {commits}"


def onnx_table() -> str:
    """The exported bundled model beside the library: quality, start to end of a process, memory."""
    document = _record("onnx")
    tasks = document["quality"]
    rows = [["", *(f"{name}, nDCG@10" for name in tasks), "process", "peak memory", "files"]]
    rows.append(["---"] * len(rows[0]))
    for name, seconds in document["seconds"].items():
        size = document["bytes of files"].get(name)
        rows.append(
            [
                name,
                *(f"{figures[name]:.3f}" for figures in tasks.values()),
                f"{seconds:.2f} s",
                f"{document['peak bytes'][name] / 1e6:,.0f} MB",
                "" if size is None else f"{size / 1e6:,.0f} MB",
            ]
        )
    records = document["provenance"]
    commands = " and ".join(f"`{record['command']}`" for record in records.values())
    last = list(records.values())[-1]
    return f"{markdown(rows)}\n\n{DEVICE}, PyTorch {last['versions']['torch']}; {commands}; commit {last['commit'][:7]}"


def _record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / DEVICE / f"{name}.json").read_text(encoding="utf-8"))


def _provenance(document: dict[str, Any]) -> str:
    provenance = document["provenance"]
    torch, commit = provenance["versions"]["torch"], provenance["commit"][:7]
    command = " ".join(_MOVED.get(word, word) for word in provenance["command"].split(" "))
    return f"{DEVICE}, PyTorch {torch}; `{command}`; commit {commit}"
