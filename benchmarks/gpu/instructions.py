"""Record what the attention kernels are made of on an H100 or H200, counted without one, for the table of docs/gpu.md.

    python -m benchmarks.gpu.instructions [--output FILE]

Each kernel is compiled ahead of time in the form that `FORMS` names (`mixkernels.resources`), in bfloat16 with k = 1
and D = 64. Figures of the kernels before ("before") are kept from the file.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.measuring.markdown import markdown
from benchmarks.measuring.provenance import ROOT, commit, versions, write_json

PATH = ROOT / "benchmarks" / "results" / "nvidia-h200" / "instructions.json"
ARCH = "sm_90"
_H200 = "k=1 D=64 bf16 NVIDIA H200"
FORMS = {
    "forward, m = 128": ("candidate_attention_fwd_short_kernel", "k=1 D=64 bf16 pool, m=128"),
    "forward, m = 128, with log-sum-exps": ("candidate_attention_fwd_short_kernel", "k=1 D=64 bf16 lse, m=128"),
    "forward, m > 128": ("candidate_attention_fwd_streamed_kernel", _H200),
    "backward, candidates": ("candidate_attention_bwd_candidates_kernel", _H200),
    "backward, shared keys": ("candidate_attention_bwd_shared_kernel", _H200),
    "backward, fused, m = 128": ("candidate_attention_bwd_fused_kernel", "k=1 D=64 bf16 pool, m=128"),
    "backward, fused, m = 64": ("candidate_attention_bwd_fused_kernel", "k=1 D=64 bf16 pool, m=64"),
}
"""Row of the table: kernel and configuration in the catalogue of compiled kernels."""
_KEYS = (
    "instructions_per_logit",
    "loop_async_copies",
    "loop_barriers",
    "layout_conversions",
    "tensor_instructions",
    "registers",
    "stack_bytes",
    "blocks_per_multiprocessor",
)


def count(name: str) -> dict[str, Any]:
    """Compile one of `FORMS` and return its figures.

    Raises:
        BackendError: triton is not installed, TRITON_INTERPRET is set, or the kernel does not compile.
    """
    from mixkernels.resources import measure
    from mixkernels.triton_common.catalogue import all_variants

    kernel, config = FORMS[name]
    variant = next(v for v in all_variants() if (v.kernel.__name__, v.config) == (kernel, config))
    found = asdict(measure(variant, ARCH))
    return {"name": name, "kernel": kernel, "config": config, **{key: found[key] for key in _KEYS}}


def table() -> str:
    """Render the recorded figures."""
    if not PATH.is_file():
        return "Not recorded yet: `python -m benchmarks.gpu.instructions` does it."
    document = json.loads(PATH.read_text(encoding="utf-8"))
    heads = "kernel, a logit before, a logit now, copies ahead, barriers, layout conversions, widest product, registers"
    rows = [[*heads.split(", "), "stack", "blocks"]]
    rows.append(["---"] * len(rows[0]))
    for record in document["records"]:
        widest = max(record["tensor_instructions"], key=_columns)
        rows.append(
            [
                record["name"],
                str(document["before"]["instructions_per_logit"].get(record["name"], "")),
                f"{record['instructions_per_logit']:.2f}",
                *(str(record[key]) for key in ("loop_async_copies", "loop_barriers", "layout_conversions")),
                widest.split(".")[1],
                *(str(record[key]) for key in ("registers", "stack_bytes", "blocks_per_multiprocessor")),
            ]
        )
    return f"{markdown(rows)}\n\n{ARCH}, Triton {document['versions']['triton']}, commit {document['commit'][:7]}"


def _columns(product: str) -> int:
    """Columns of a warpgroup's product such as "HGMMA.64x128x16.F32.BF16"; 0 for a warp's."""
    shape = product.split(".")[1]
    return int(shape.split("x")[1]) if "x" in shape else 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.instructions", description=__doc__)
    parser.add_argument("--output", type=Path, default=PATH, metavar="FILE")
    options = parser.parse_args(arguments)
    before = json.loads(PATH.read_text(encoding="utf-8"))["before"]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        records = list(pool.map(count, FORMS))
    write_json(
        options.output,
        {"arch": ARCH, "commit": commit(), "versions": versions(), "before": before, "records": records},
    )


if __name__ == "__main__":
    main()
