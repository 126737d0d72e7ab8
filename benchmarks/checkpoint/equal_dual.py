"""Train a dual-encoder as the bundled checkpoint was: ``python -m benchmarks.checkpoint.equal_dual --output DUAL``.

Same encoder, data, batches, steps and rates in both stages, without the settings that only a MixEncoder has. The card
shows the result of ``mixencoder evaluate --model DUAL`` next to the checkpoint's.
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
    """Turn a stage of the checkpoint's training into fields of `TrainConfig` for a dual-encoder."""
    shared = inspect.signature(EncoderConfig).parameters
    config = {name: value for name, value in stage.get("config", {}).items() if name in shared}
    return {**stage, "config": config, "architecture": "dual-encoder"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint.equal_dual", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data, and free/")
    parser.add_argument("--backbone", required=True, help="all-MiniLM-L6-v2")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the model; stage one writes OUTPUT.first"
    )
    options = parser.parse_args()
    stages = [yaml.safe_load((PRETRAINED / name).read_text(encoding="utf-8")) for name in STAGES]
    first = options.output.with_name(f"{options.output.name}.first")
    runs = [(first, {"backbone": options.backbone}), (options.output, {"model": str(first)})]
    for stage, (output, start) in zip(stages, runs, strict=True):
        fields = dual_stage(stage) | start
        train(TrainConfig(**fields, output=str(output), data_dir=str(options.data_dir), resume=True))


if __name__ == "__main__":
    main()
