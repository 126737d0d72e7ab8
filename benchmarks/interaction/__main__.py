"""Try variants: ``python -m benchmarks.interaction --features FEATURES --backbone MINILM --device NAME``.

Writes one record for each variant to benchmarks/results/DEVICE/interaction/; those that exist are kept.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from benchmarks.interaction.encodings import Lists
from benchmarks.interaction.learning import learn
from benchmarks.interaction.variants import VARIANTS
from benchmarks.measuring.provenance import ROOT, commit
from mixencoder.evaluation.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interaction", description=__doc__)
    parser.add_argument("--features", type=Path, required=True, help="folder that `features` wrote")
    parser.add_argument("--backbone", required=True, help="the encoder that made them")
    parser.add_argument("--device", required=True, help="name of the machine, of the folder of results")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="these alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def read(kind: str) -> dict[str, Lists]:
        paths = sorted(options.features.glob(f"{kind}.*.pt"))
        return {path.stem.removeprefix(f"{kind}."): torch.load(path, weights_only=False) for path in paths}

    sources, sets = read("train"), read("dev")
    teacher = {
        path.stem.removeprefix("teacher.train."): tuple(vectors.float() for vectors in torch.load(path))
        for path in sorted(options.features.glob("teacher.train.*.pt"))
    }
    folder = ROOT / "benchmarks" / "results" / options.device / "interaction"
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.variant or VARIANTS:
        path = folder / f"{name}.{options.seed}.json"
        if path.is_file():
            continue
        variant = VARIANTS[name]
        if variant.teacher and set(teacher) != set(sources):
            print(f"{name}: left out, as benchmarks.interaction.teacher has not encoded every source", flush=True)
            continue
        found = learn(options.backbone, variant, sources, sets, teacher, options.seed)
        record = {"variant": name, **dataclasses.asdict(variant), "seed": options.seed, "commit": commit()}
        record |= {"threads": torch.get_num_threads(), **found}
        write_text(path, json.dumps(record, indent=1) + "\n")
        last = found["points"][-1]["unseen"]
        print(f"{name}: { ({key: round(value, 4) for key, value in last.items()}) }", flush=True)


if __name__ == "__main__":
    main()
