"""``python -m benchmarks.comparison TASK --data-dir DATA --backbone MINILM --device NAME``.

TASK is nli, replies, answers, passages, all, or ablations, which need the contenders of replies first. Writes one
record per contender and seed to benchmarks/results/DEVICE/; records that exist already are kept.
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.cells import Cell, Paths, make_record, wanted_cells
from benchmarks.comparison.settings import ABLATIONS, CONTENDERS, SETTINGS, TASKS
from benchmarks.measuring.provenance import ROOT


def _summary(record: dict[str, Any]) -> str:
    found = ", ".join(
        f"{report} {entry['measure']} {entry['results'][report]['full'][entry['measure']]:.3f}"
        for report, entry in record["reports"].items()
    )
    seconds = record["seconds"]
    which = f"{record['task']} {record['contender']} seed {record['seed']}"
    return f"{which}: {found}; trained {seconds['train']:.0f} s, measured {seconds['measure']:.0f} s"


def _waits_for_teacher(cell: Cell, others: list[Cell]) -> bool:
    """Whether one of the other cells trains this cell's teacher."""
    return any(cell.learns_from(other) for other in others)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison", description=__doc__)
    parser.add_argument("task", choices=[*TASKS, "all", "ablations"])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data")
    parser.add_argument("--backbone", type=Path, required=True, help="encoder that all contenders start from")
    parser.add_argument("--device", required=True, help="name of the folder of results")
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument(
        "--contender", choices=[*CONTENDERS, *ABLATIONS], action="append", help="only this one; may be repeated"
    )
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "comparison", help="for trained models")
    parser.add_argument("--processes", type=int, default=1, help="cells at a time; they share the threads")
    options = parser.parse_args()
    paths = Paths(options.data_dir, options.backbone, options.work_dir)
    known = ABLATIONS if options.task == "ablations" else CONTENDERS
    if unknown := sorted(set(options.contender or []) - set(known)):
        parser.error(f"{options.task} has no {', '.join(unknown)}; it has {', '.join(known)}")
    kind = "ablations" if options.task == "ablations" else "comparison"
    folder = ROOT / "benchmarks" / "results" / options.device / f"{kind}_{options.setting}"
    cells = wanted_cells(options.task, options.setting, options.contender)
    missing = [cell for cell in cells if not (folder / cell.file_name).is_file()]
    make = partial(make_record, setting=options.setting, paths=paths, folder=folder)
    start = time.perf_counter()
    threads = max(1, torch.get_num_threads() // options.processes)
    # read when a process loads its libraries; processes are spawned, since forked ones would share this one's threads
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    # long cells first, so that no process is idle at the end
    missing.sort(key=lambda cell: TASKS[cell.task].steps[options.setting], reverse=True)
    running: dict[Future, Cell] = {}
    failed = []
    with ProcessPoolExecutor(options.processes, context) as pool:
        while missing or running:
            ready = [cell for cell in missing if not _waits_for_teacher(cell, [*missing, *running.values()])]
            for cell in ready[: options.processes - len(running)]:
                running[pool.submit(make, cell)] = cell
                missing.remove(cell)
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(done)
                minutes = (time.perf_counter() - start) / 60
                # the other cells run even if one fails
                if error := done.exception():
                    failed.append(cell)
                    print(f"{cell.file_name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                else:
                    print(f"{_summary(done.result())}, {minutes:.1f} min in all", flush=True)
    if failed:
        sys.exit(f"{len(failed)} of {len(cells)} failed: {', '.join(cell.file_name for cell in failed)}")


if __name__ == "__main__":
    main()
