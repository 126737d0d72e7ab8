"""``python -m benchmarks.comparison TASK --data-dir DATA --backbone MINILM --device NAME``.

TASK is nli, replies, answers, passages or all. Writes one record a contender and seed to
benchmarks/results/DEVICE/comparison_SETTING/, and leaves those alone that are there already.
"""

import argparse
import time
from pathlib import Path

from benchmarks.comparison.cells import Places, run_cell, write_record
from benchmarks.comparison.tasks import CONTENDERS, SETTINGS, TASKS
from benchmarks.gpu_records import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison", description=__doc__)
    parser.add_argument("task", choices=[*TASKS, "all"])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data")
    parser.add_argument("--backbone", type=Path, required=True, help="encoder that all contenders start from")
    parser.add_argument("--device", required=True, help="name of the machine, of the folder of results")
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--contender", choices=CONTENDERS, action="append", help="these alone")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "comparison", help="for trained models")
    options = parser.parse_args()
    places = Places(options.data_dir, options.backbone, options.work_dir)
    results = ROOT / "benchmarks" / "results" / options.device / f"comparison_{options.setting}"
    start = time.perf_counter()
    for task in TASKS if options.task == "all" else [options.task]:
        for seed in SETTINGS[options.setting].seeds:
            for name in options.contender or CONTENDERS:
                if (results / f"{task}.{name}.{seed}.json").is_file():
                    continue
                record = run_cell(task, name, CONTENDERS[name], options.setting, seed, places)
                write_record(record, results)
                found = ", ".join(
                    f"{report} {entry['measure']} {entry['results'][report]['full'][entry['measure']]:.3f}"
                    for report, entry in record["reports"].items()
                )
                seconds = record["seconds"]
                print(
                    f"{task} {name} seed {seed}: {found}; trained {seconds['train']:.0f} s, measured "
                    f"{seconds['measure']:.0f} s, {(time.perf_counter() - start) / 60:.1f} min in all",
                    flush=True,
                )


if __name__ == "__main__":
    main()
