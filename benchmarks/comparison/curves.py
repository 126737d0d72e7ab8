"""Learning curves: ``python -m benchmarks.comparison.curves TASK --data-dir DATA --backbone MINILM --device NAME``.

Every contender is trained once, with learning rates that stay at their peak until the last tenth of the steps, and
measured at the steps of `POINTS`; at the last point the rates have fallen to zero. Interrupted, the same command
resumes. Writes one record for each contender and seed to benchmarks/results/DEVICE/curves/.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.cells import Paths, load_limited, measure
from benchmarks.comparison.settings import CURVES, JOINT_NEGATIVES, READ_JOINTLY, TRAINING, Curve, Setting
from benchmarks.measuring.provenance import ROOT, commit
from mixencoder.evaluation.files import write_text
from mixencoder.training.run import RECORD, TrainConfig, train
from mixencoder.training.snapshots import snapshot_path

POINTS = (125, 250, 500, 1000, 2000, 4000)
"""Steps; the last one ends the run."""
MEASURED = Setting(seeds=(0,), queries=1000, pairs=1000, joint_long_queries=None, bf16=False, measured_at_once=64)
"""How every point is measured."""


def run_curve(task: str, name: str, seed: int, paths: Paths, *, bf16: bool, points: tuple[int, ...]) -> dict[str, Any]:
    """Train a contender, measure it at every point and return the record; goes on from what an earlier run did."""
    curve = CURVES[task]
    contender = curve.contenders[name]
    output = paths.model("curves", task, name, seed)
    fields = {**TRAINING, **contender.training, "steps": points[-1], "bf16": bf16, "seed": seed}
    fields |= {"batch_size": curve.batch_size, "learning_rate": curve.learning_rate}
    if contender.architecture in READ_JOINTLY:
        fields["negatives"] = JOINT_NEGATIVES
    start = time.perf_counter()
    if not (output / RECORD).is_file():
        train(
            TrainConfig(
                output=str(output),
                data=list(curve.train),
                data_dir=str(paths.data),
                architecture=contender.architecture,
                backbone=str(paths.backbone),
                config={"query_truncation_side": "left", **contender.config},
                schedule="stable",
                snapshots=list(points[:-1]),
                save_every=250,
                resume=True,
                **fields,
            )
        )
    trained = time.perf_counter() - start
    found = []
    for steps in points:
        model = output if steps == points[-1] else snapshot_path(output, steps)
        found.append({"steps": steps, "reports": _measured(model, curve, paths, fields)})
    return {
        "task": task,
        "contender": name,
        "seed": seed,
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "seconds": {"train": trained, "measure": time.perf_counter() - start - trained},
        "training": json.loads((output / RECORD).read_text(encoding="utf-8")),
        "points": found,
    }


def _measured(model: Path, curve: Curve, paths: Paths, fields: dict[str, Any]) -> dict[str, Any]:
    """Measure a point, or read what was measured before an interruption."""
    kept = model / "measured.json"
    if not kept.is_file():
        engine = load_limited(model, fields)
        reports: dict[str, Any] = {}
        for report in curve.reports:
            reports |= measure(engine, model, report, MEASURED, paths)
        write_text(kept, json.dumps(reports) + "\n")
    return json.loads(kept.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison.curves", description=__doc__)
    parser.add_argument("task", choices=CURVES)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data")
    parser.add_argument("--backbone", type=Path, required=True, help="encoder that all contenders start from")
    parser.add_argument("--device", required=True, help="name of the machine, of the folder of results")
    parser.add_argument("--contender", action="append", help="these alone")
    parser.add_argument("--seed", type=int, action="append", help="these, instead of 0")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--steps", type=int, action="append", help="points of the curve, instead of the usual ones")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "comparison", help="for trained models")
    options = parser.parse_args()
    known = CURVES[options.task].contenders
    if unknown := sorted(set(options.contender or []) - set(known)):
        parser.error(f"{options.task} has no {', '.join(unknown)}; it has {', '.join(known)}")
    paths = Paths(options.data_dir, options.backbone, options.work_dir)
    points = tuple(sorted(set(options.steps or POINTS)))
    folder = ROOT / "benchmarks" / "results" / options.device / "curves"
    for seed in options.seed or [0]:
        for name in options.contender or known:
            path = folder / f"{options.task}.{name}.{seed}.json"
            if path.is_file():
                continue
            record = run_curve(options.task, name, seed, paths, bf16=options.bf16, points=points)
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(record, indent=1) + "\n")
            output = paths.model("curves", options.task, name, seed)
            for steps in points[:-1]:
                shutil.rmtree(snapshot_path(output, steps), ignore_errors=True)
            hours = sum(record["seconds"].values()) / 3600
            print(f"{options.task} {name} seed {seed}: {hours:.1f} h", flush=True)


if __name__ == "__main__":
    main()
