"""The tables of README and docs, from committed results. Losses are shown as well as wins."""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from benchmarks.checkpoint.card import QUALITY, quality_rows
from benchmarks.comparison.tables import ablation_rows, comparison_rows, growth_rows, part_rows
from benchmarks.comparison.tables import read_records as read_comparison
from benchmarks.gpu.instructions import table as instructions_table
from benchmarks.gpu.records import read_records as read_gpu_records
from benchmarks.gpu.records import targets
from benchmarks.measuring.markdown import markdown, markdown_table, multiple
from benchmarks.report.billion_tables import (
    scale_bytes_table,
    scale_encoding_table,
    scale_simulation_table,
    scale_stages_table,
)
from benchmarks.report.index_tables import (
    MACHINES,
    first_stage_table,
    index_limits_table,
    index_table,
    products_table,
)
from benchmarks.report.learning_tables import adapting_table, curves_table, interaction_table, trials_table
from benchmarks.report.process_tables import (
    fuzzing_table,
    onnx_table,
    serving_table,
    serving_threads_table,
    startup_table,
    threads_table,
)
from benchmarks.report.scale_tables import ray_build_table, sharded_table
from benchmarks.suite.case import Record
from benchmarks.suite.results import RESULTS, case_name, read_results

DEVICE = "cpu-zen3-2-threads"
"""The machine whose results the documents show."""
FOLDER = RESULTS / DEVICE
GPU_FOLDER = RESULTS / "nvidia-h200"
ATTENTION = "candidate_attention"
STEP = "candidate_attention training step"

Rows = list[list[str]]


def not_recorded(group: str) -> str:
    """The text in place of a table whose group has no record yet."""
    return f"Not recorded yet: `python -m benchmarks.record --device {DEVICE} --only {group}` does it."


def share_of_limit(record: Record, limit: str = "limit") -> float:
    """A record's fraction of the limit, or of the "measured" one.

    Raises:
        ValueError: it is above 1, so the time or the peaks are wrong, and the figure must not be shown.
    """
    fraction = record[f"fraction_of_{limit}"]
    if not fraction <= 1:
        raise ValueError(
            f"{case_name(record)}: {record['backend']} is at {fraction:.3g} of its limit; expected 1 at most: "
            "measure it again on a quiet machine (docs/benchmarks.md)"
        )
    return fraction


def suite_records(group: str, *operators: str) -> list[Record]:
    """Records of a group, only of `operators` if given; empty if there is no file."""
    path = FOLDER / f"{group}.json"
    records = read_results(path).records if path.is_file() else []
    return [record for record in records if not operators or record["operator"] in operators]


def by_case(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by operator, shape and dtype, in the order of the file; variants of a case are together."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(json.dumps([record["operator"], record["shape"], record["dtype"]]), []).append(record)
    return found


def _own(records: Sequence[Record]) -> Record:
    return next(record for record in records if record["own"])


def _ratios(records: Sequence[Record]) -> dict[str, float]:
    """Every rival's time over ours, rivals of variants last; of a rival with several runs the first counts."""
    found: dict[str, float] = {}
    for record in records:
        if record["own"] and record["backend"] == _own(records)["backend"]:
            for name, ratio in record["ratios"].items():
                found.setdefault(name, ratio)
    return found


def _machine(group: str) -> str:
    """The last line of a table: machine, PyTorch and commit of its results."""
    results = read_results(FOLDER / f"{group}.json")
    built = sorted({(record["versions"]["torch"], record["commit"][:10]) for record in results.records})
    machine = results.machine
    cpu = f"{machine['name']}, {machine['capability']}, {machine['threads']} threads"
    return f"{cpu}; " + "; ".join(f"PyTorch {torch}, commit {commit}" for torch, commit in built)


def _sizes(shape: Mapping[str, int], *names: str) -> str:
    return ", ".join(f"{name} = {shape[name]:,}" for name in names or shape)


def milliseconds(seconds: float) -> str:
    """Write a time in milliseconds, with three digits."""
    value = seconds * 1000
    return f"{value:,.0f} ms" if value >= 99.95 else f"{value:.3g} ms"


def attention_table() -> str:
    """For every shape the torch backend's time, and every rival's time as a multiple of it."""
    cases = by_case(suite_records("operators", ATTENTION))
    if not cases:
        return not_recorded("operators")
    rivals = list(dict.fromkeys(name for records in cases.values() for name in _ratios(records)))
    rows = [["N", "k", "m", "precision", "torch backend", "of the limit", *rivals], ["---"] * (6 + len(rivals))]
    for records in cases.values():
        own, ratios = _own(records), _ratios(records)
        rows.append(
            [
                *(str(own["shape"][name]) for name in ("N", "k", "m")),
                own["dtype"],
                f"{own['seconds'] * 1000:.2f} ms",
                f"{share_of_limit(own):.0%}",
                *(f"{ratios[name]:.2f}x" if name in ratios else "" for name in rivals),
            ]
        )
    return markdown(rows)


def training_table() -> str:
    """Every contender's training step: time, allocated memory, and time as a multiple of the torch backend's."""
    cases = by_case(suite_records("operators", STEP))
    if not cases:
        return not_recorded("operators")
    rows = [["step by", "queries x candidates", "time", "relative to ours", "peak memory of the call"], ["---"] * 5]
    for records in cases.values():
        own = _own(records)
        for record in (one for one in records if not one["variant"]):
            rows.append(
                [
                    "mixkernels, torch backend" if record is own else record["backend"],
                    f"{record['shape']['B']} x {record['shape']['N']}",
                    f"{record['seconds'] * 1000:.0f} ms",
                    f"{record['seconds'] / own['seconds']:.2f}x",
                    f"{record['peak_bytes'] / 1e6:.0f} MB",
                ]
            )
    return markdown(rows)


def operators_table() -> str:
    """The remaining operators and modes: time, share of the limit, every rival as a multiple."""
    records = [record for record in suite_records("operators") if record["operator"] not in (ATTENTION, STEP)]
    return _ratio_table("operators", records)


def layers_table() -> str:
    """One interaction layer against the same layer over standard attention."""
    return _ratio_table("layers", suite_records("layers"))


def index_operations_table() -> str:
    """Build, open, update and rank an index, and the same with a file of vectors written by torch.save."""
    return _ratio_table("index", suite_records("index"))


def _ratio_table(group: str, records: Sequence[Record]) -> str:
    cases = by_case(records)
    if not cases:
        return not_recorded(group)
    rows = [["what", "shape", "by", "time", "of the limit", "rivals, as multiples"], ["---"] * 6]
    for found in cases.values():
        for record in (one for one in found if one["own"] and not one["variant"]):
            ratios = record["ratios"] if record is not _own(found) else _ratios(found)
            rows.append(
                [
                    record["operator"],
                    _sizes(record["shape"]),
                    record["backend"],
                    milliseconds(record["seconds"]),
                    f"{share_of_limit(record):.0%}",
                    ", ".join(f"{name} {multiple(ratio)}" for name, ratio in ratios.items()),
                ]
            )
    return f"{markdown(rows)}\n\n{_machine(group)}"


def end_to_end_table() -> str:
    """For every N the time from text to ranking, and the other contenders' as multiples of it."""
    cases = by_case(suite_records("end_to_end"))
    if not cases:
        return not_recorded("end_to_end")
    records = [record for found in cases.values() for record in found]
    others = list(dict.fromkeys(record["backend"] for record in records))
    others.remove(_own(records)["backend"])
    rows = [["N", _own(records)["backend"], "of the limit", *others], ["---"] * (3 + len(others))]
    for found in cases.values():
        own, times = _own(found), {record["backend"]: record["seconds"] for record in found}
        rows.append(
            [
                f"{own['shape']['N']:,}",
                milliseconds(own["seconds"]),
                f"{share_of_limit(own):.0%}",
                *(multiple(times[name] / own["seconds"]) if name in times else "" for name in others),
            ]
        )
    return f"{markdown(rows)}\n\n{_machine('end_to_end')}"


def quality_table() -> str:
    """Every task's measures: two dual-encoders, and the default's score whole and by parts."""
    found = (json.loads((FOLDER / f"quality_{name}.json").read_text(encoding="utf-8")) for name in QUALITY)
    return markdown_table(quality_rows(*found))


def _precision_records() -> list[dict]:
    path = FOLDER / "index_precision.json"
    return json.loads(path.read_text(encoding="utf-8"))["records"]


def precision_table() -> str:
    """Every stored format: size and quality."""
    rows = [
        ["layout", "precision", "bytes per candidate", "nDCG@10", "best ten found again", "time per query"],
        ["---"] * 6,
    ]
    for record in _precision_records():
        if "prefilter" not in record and "score" not in record:
            precision = record["precision"] + (", int8 products" if "products" in record else "")
            size = f"{record['bytes_per_candidate']:,}"
            rows.append([record["layout"], precision, size, *_quality(record)])
    return markdown(rows)


def prefilter_table() -> str:
    """Every prefilter: quality and time."""
    rows = [["prefilter", "nDCG@10", "best ten found again", "time per query"], ["---"] * 4]
    for record in _precision_records():
        if (record["layout"], record["precision"]) == ("projected", "float16") and "products" not in record:
            kept = "dual score alone" if "score" in record else str(record.get("prefilter", "none"))
            rows.append([kept, *_quality(record)])
    return markdown(rows)


def prefilter_changes_table() -> str:
    """In how many queries every prefilter changes the best ten; on any processor, as nothing is timed."""
    paths = sorted(RESULTS.glob("cpu-*/index_prefilter.json"))
    if not paths:
        return "Not recorded yet: `python -m benchmarks.index.prefilter` does it."
    header = ["collection", "N", "prefilter", "other documents", "other order", "mean overlap", "nDCG@10"]
    rows = [header, ["---"] * len(header)]
    for record in json.loads(paths[0].read_text(encoding="utf-8"))["records"]:
        if record["prefilter"] != "all" or "ndcg_at_10" in record:
            shares = (f"{record[name]:.1%}" for name in ("other_set", "other_order", "overlap_at_10"))
            ndcg = f"{record['ndcg_at_10']:.4f}" if "ndcg_at_10" in record else ""
            name = "none" if record["prefilter"] == "all" else record["prefilter"]
            rows.append([record["collection"], f"{record['documents']:,}", name, *shares, ndcg])
    return markdown(rows)


def million_table() -> str:
    """Time and memory of a large index, on every machine that was measured."""
    found = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("cpu-*/index_million.json"))
    }
    rows = [["", *(MACHINES.get(device, device) for device in found)], ["---"] * (1 + len(found))]
    rows += [list(line) for line in zip(*(_million_column(record) for record in found.values()), strict=True)]
    names = (
        "candidates",
        "to fill",
        "to open",
        "to rank all for a query",
        "with the default prefilter",
        "size of the array files / bytes of the arrays",
        "ids and checksums",
        "anonymous memory gained while ranking",
    )
    return markdown([*rows[:2], *([name, *line] for name, line in zip(names, rows[2:], strict=True))])


def _million_column(found: dict) -> list[str]:
    seconds, memory = found["seconds"], found["anonymous_bytes"]
    gained = memory["most while ranking"] - memory["before ranking"]
    prefiltered = seconds.get("rank with prefilter")
    return [
        f"{found['documents']:,}",
        f"{seconds['fill']:.0f} s",
        f"{seconds['open'] * 1000:.0f} ms",
        f"{seconds['rank']:.0f} s",
        "" if prefiltered is None else f"{prefiltered * 1000:.0f} ms",
        f"{found['array_file_bytes'] / found['array_bytes']:.4f}",
        f"{found['catalogue_bytes'] / 1e6:.0f} MB",
        f"{gained / 1e6:.1f} MB",
    ]


def _quality(record: dict) -> list[str]:
    milliseconds = f"{record['seconds_per_query'] * 1000:.0f} ms"
    return [f"{record['ndcg_at_10']:.4f}", f"{record['overlap_at_10']:.1%}", milliseconds]


COMPARISONS = {"small": FOLDER / "comparison_small", "medium": GPU_FOLDER / "comparison_medium"}
"""Setting -> folder of its records."""


def _comparison(rows: Callable[[list[dict[str, Any]]], Rows], setting: str = "small") -> str:
    if not COMPARISONS[setting].is_dir():
        return f"Not recorded yet: `python -m benchmarks.comparison all --setting {setting}` does it."
    return markdown(rows(read_comparison(COMPARISONS[setting])))


def latency_record() -> dict[str, Any]:
    """The newest record of the time of a query for each contender of the comparison, of any CPU."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("cpu-*/comparison_latency.json")]
    return max(found, key=lambda document: document["date"])


def comparison_table(setting: str = "small") -> str:
    """Quality of all architectures trained alike, and what a query and a candidate cost."""
    return _comparison(
        lambda records: comparison_rows(records, latency_record()["contenders"], intervals=False), setting
    )


def ablation_table(setting: str = "small") -> str:
    """MixEncoder with one thing changed at a time."""
    folder = COMPARISONS[setting].with_name(f"ablations_{setting}")
    if not folder.is_dir():
        return f"Not recorded yet: `python -m benchmarks.comparison ablations --setting {setting}` does it."
    return _comparison(lambda records: ablation_rows(records, read_comparison(folder)), setting)


_SUMMARY_RIVALS = ("two-pass-cudnn-compiled", "flex-compiled", "einsum-compiled", "sdpa-expanded")


def gpu_attention_table(only: Collection[str] = ()) -> str:
    """For every shape the kernel's time on a GPU, and rivals' as multiples of it: all, or those named."""
    path = GPU_FOLDER / "gpu_attention.json"
    if not path.is_file():
        return "Not recorded yet: `python -m benchmarks.gpu` does it."
    document = json.loads(path.read_text(encoding="utf-8"))
    own = [record for record in document["records"] if record["backend"] == "triton"]
    named = {name for record in own for name in record["ratios"] if not only or name in only}
    # a rival that skipped the first shape comes last
    rivals = sorted(named, key=lambda name: own[0]["ratios"].get(name, math.inf))
    rows = [["N", "k", "m", "D", "kernel", "of the measured limit", "bound by", "TFLOP/s", *rivals]]
    rows.append(["---"] * len(rows[0]))
    for record in own:
        rows.append(
            [
                *(f"{record['shape'][name]:,}" for name in ("N", "k", "m", "D")),
                f"{record['seconds'] * 1e6:.0f} us",
                f"{share_of_limit(record, 'measured'):.0%}",
                record["bound"],
                f"{record['tflops']:.0f}",
                *(multiple(record["ratios"][name]) if name in record["ratios"] else "" for name in rivals),
            ]
        )
    versions = document["versions"]
    built = f"PyTorch {versions['torch']}, Triton {versions['triton']}, cuDNN {versions['cudnn']}"
    return f"{markdown(rows)}\n\n{document['device']}, bfloat16; {built}; commit {document['commit']}"


def gpu_targets_table() -> str:
    """Targets for a GPU, and the worst measured value of each."""
    rows = [["target", "goal", "worst measured", "verdict"], ["---"] * 4]
    for target in targets(read_gpu_records(GPU_FOLDER)):
        sign = "<=" if target.at_most else ">="
        found = "" if target.value is None else f"{target.value:.3g} {target.unit}".strip()
        rows.append([target.claim, f"{sign} {target.goal:.3g} {target.unit}".strip(), found, target.verdict.lower()])
    return markdown(rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "index": index_table,
    "index limits": index_limits_table,
    "products": products_table,
    "precision": precision_table,
    "prefilter": prefilter_table,
    "prefilter changes": prefilter_changes_table,
    "million": million_table,
    "first stage": first_stage_table,
    "attention": attention_table,
    "training": training_table,
    "operators": operators_table,
    "layers": layers_table,
    "end to end": end_to_end_table,
    "index operations": index_operations_table,
    "quality": quality_table,
    "comparison": comparison_table,
    "comparison parts": lambda: _comparison(part_rows),
    "comparison medium": lambda: comparison_table("medium"),
    "comparison medium parts": lambda: _comparison(part_rows, "medium"),
    "comparison growth": lambda: _comparison(growth_rows),
    "ablation": ablation_table,
    "ablation medium": lambda: ablation_table("medium"),
    "curves": curves_table,
    "interaction variants": interaction_table,
    "adapting": adapting_table,
    "trials": trials_table,
    "gpu attention": gpu_attention_table,
    "gpu summary": lambda: gpu_attention_table(_SUMMARY_RIVALS),
    "gpu targets": gpu_targets_table,
    "gpu instructions": instructions_table,
    "threads": threads_table,
    "serving": serving_table,
    "fuzzing": fuzzing_table,
    "serving threads": serving_threads_table,
    "startup": startup_table,
    "onnx": onnx_table,
    "scale bytes": scale_bytes_table,
    "scale stages": scale_stages_table,
    "scale encoding": scale_encoding_table,
    "scale simulation": scale_simulation_table,
    "sharded": sharded_table,
    "ray build": ray_build_table,
}
"""By the name in a document's marks."""
