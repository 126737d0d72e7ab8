"""Candidates for the bundled checkpoint, on domains that none was trained on:
``python -m benchmarks.checkpoint.trials --data-dir DATA --backbone MINILM --device NAME --model retrained=FOLDER``.

Measures the untrained encoder, the bundled checkpoint and every ``--model`` on the development sets of
`benchmarks.checkpoint.share`, with every share of the interaction. Nothing is timed. Adds to
benchmarks/results/DEVICE/default_trials.json; a model of the same name is replaced.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint.share import (
    LISTS,
    MAX_DOCUMENT_TOKENS,
    MEASURE,
    POOL,
    POOLS,
    QUERIES,
    SEED,
    figures_by_share,
    pool_task,
)
from benchmarks.measuring.provenance import ROOT, commit, write_json
from mixencoder import MixEncoder
from mixencoder.evaluation.model_scores import score_candidates
from mixencoder.evaluation.tasks import RankingTask, read_tasks

UNTRAINED, BUNDLED = "untrained", "bundled"
QUIET = {"batch_size": 32, "show_progress_bar": False}


def figures(engine: MixEncoder, tasks: Sequence[RankingTask], *, trained: bool) -> dict[str, dict[str, float]]:
    """Return {task: {share: figure}}; an untrained model has share 0 alone, the cosine."""
    reader = engine.with_limits(max_document_length=MAX_DOCUMENT_TOKENS)
    found = {}
    for task in tasks:
        if trained:
            by_share = figures_by_share(task, score_candidates(reader, task, ("interaction", "dual"), QUIET))
        else:
            dual = score_candidates(reader, task, ("dual",), QUIET)["dual"]
            nothing = [torch.zeros_like(scores) for scores in dual]
            by_share = {0.0: figures_by_share(task, {"interaction": nothing, "dual": dual})[0.0]}
        found[task.name] = {str(share): value for share, value in by_share.items()}
        print(task.name, found[task.name], flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint.trials", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data, and free/")
    parser.add_argument("--backbone", type=Path, required=True, help="the encoder that all started from")
    parser.add_argument("--device", required=True, help="name of the folder of results")
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER of another trained checkpoint")
    options = parser.parse_args(arguments)
    tasks = [pool_task(options.data_dir / name) for name in POOLS]
    tasks += read_tasks([options.data_dir / name for name in LISTS], limit=QUERIES, sample=SEED)
    path = ROOT / "benchmarks" / "results" / options.device / "default_trials.json"
    records: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["records"] if path.is_file() else {}
    named = dict(name.split("=", 1) for name in options.model)
    for name in (UNTRAINED, BUNDLED, *named):
        if name == UNTRAINED:
            engine = MixEncoder.from_backbone(options.backbone, dual_term=True)
        else:
            engine = MixEncoder.from_pretrained(named.get(name))
        print(name)
        found = figures(engine, tasks, trained=name != UNTRAINED)
        records[name] = {"figures": found, "commit": commit()}
        shape = {"measure": MEASURE, "queries": QUERIES, "pool": POOL, "seed": SEED, "records": records}
        write_json(path, shape)


if __name__ == "__main__":
    main()
