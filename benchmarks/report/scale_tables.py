"""Tables of indexes in shards: what ranking them costs, and building with Ray."""

import json
from typing import Any

from benchmarks.measuring.markdown import markdown
from benchmarks.suite.results import RESULTS

DEVICE = "cpu-emerald-rapids-2-threads"
_STAGES = {
    "plain": "plain build, {workers} threads",
    "ray": "with Ray, {workers} workers",
    "killed": "with Ray, one of {workers} workers killed",
}


def sharded_table() -> str:
    """Time of a ranking by where its documents are, with and without a prefilter, and what that is above one index."""
    document = _record("index_sharded")
    if document is None:
        return "Not recorded yet: `python -m benchmarks.index.sharded` does it."
    header = ["", *(_PREFILTERS[record["prefilter"]] for record in document["records"])]
    rows = [header, ["---"] * len(header)]
    few = document["few"]
    names = {
        "one": "one index",
        "read as one": f"{document['shards']} shards, read as one",
        "actors": f"{document['shards']} shards in Ray, an actor each",
        "few actors": f"{few} shards in Ray, an actor each",
    }
    for way, name in names.items():
        cells = []
        for record in document["records"]:
            own, one = record["seconds"][way], record["seconds"]["one"]
            above = "" if way == "one" else f" ({1000 * (own - one):+,.1f})"
            cells.append(f"{1000 * own:,.1f} ms{above}")
        rows.append([name, *cells])
    return f"{markdown(rows)}\n\n{document['documents']:,} documents, {_provenance(document)}"


def ray_build_table() -> str:
    """Seconds of a build by stage and part."""
    document = _record("ray_build")
    if document is None:
        return "Not recorded yet: `python -m benchmarks.processes.ray_build` does it."
    stages = document["stages"]
    parts = list(dict.fromkeys(part for stage in stages.values() for part in stage["parts"]))
    rows = [["build", "all", *parts], ["---"] * (2 + len(parts))]
    for name, title in _STAGES.items():
        if name in stages:
            stage = stages[name]
            cells = [f"{stage['parts'][part]:,.1f} s" if part in stage["parts"] else "" for part in parts]
            rows.append([title.format(workers=document["workers"]), f"{stage['seconds']:,.0f} s", *cells])
    commits = ", ".join(dict.fromkeys(stage["commit"][:7] for stage in stages.values()))
    command = document["provenance"]["command"]
    torch = document["provenance"]["versions"]["torch"]
    where = f"{document['documents']:,} documents, {DEVICE}, PyTorch {torch}"
    return f"{markdown(rows)}\n\n{where}; `{command}`; commit {commits}"


_PREFILTERS = {None: "all scored", "auto": "default prefilter"}


def _record(name: str) -> dict[str, Any] | None:
    path = RESULTS / DEVICE / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _provenance(document: dict[str, Any]) -> str:
    provenance = document["provenance"]
    torch, ray = provenance["versions"]["torch"], provenance["versions"]["ray"]
    return f"{DEVICE}, PyTorch {torch}, Ray {ray}; `{provenance['command']}`; commit {provenance['commit'][:7]}"
