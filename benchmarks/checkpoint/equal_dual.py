"""Train a dual-encoder as the bundled checkpoint was: ``python -m benchmarks.checkpoint.equal_dual --output DUAL``.

Same encoder, data, batches, steps and rates in both stages; what only a MixEncoder has is left out. The card shows the
result of ``mixencoder evaluate --model DUAL`` beside the checkpoint's.
"""

import argparse
import inspect
from pathlib import Path
from typing import Any

import yaml

from benchmarks.checkpoint.card import PRETRAINED, STAGES
from mixencoder.base.configuration import EncoderConfig
from mixencoder.training.run import TrainConfig, train


def dual_stage(stage: dict[str, Any]) -> dict[str, Any]:
    """Fields of `TrainConfig` for a dual-encoder out of a stage of the checkpoint's."""
    shared = inspect.signature(EncoderConfig).parameters
    config = {name: value for name, value in stage.get("config", {}).items() if name in shared}
    return {**stage, "config": config, "architecture": "dual-encoder"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint.equal_dual", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data, and free/")
    parser.add_argument("--backbone", required=True, help="all-MiniLM-L6-v2")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; OUTPUT.first has stage one's")
    options = parser.parse_args()
    stages = [yaml.safe_load((PRETRAINED / name).read_text(encoding="utf-8")) for name in STAGES]
    first = options.output.with_name(f"{options.output.name}.first")
    places = [(first, {"backbone": options.backbone}), (options.output, {"model": str(first)})]
    for stage, (output, start) in zip(stages, places, strict=True):
        fields = dual_stage(stage) | start
        train(TrainConfig(**fields, output=str(output), data_dir=str(options.data_dir), resume=True))


if __name__ == "__main__":
    main()
