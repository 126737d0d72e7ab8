"""Choose the weight of the interaction: ``python -m benchmarks.checkpoint.share --model TRAINED --output CHOSEN``.

The score is ``b h . e + a cos(q, c)``; training uses b = 1. Here b is chosen on development sets of other domains, none
of them trained on or reported, and folded into the weights, so that the form of the model does not change. Writes the
checkpoint CHOSEN, and the figures to CHOSEN/share.json.
"""

import argparse
import gzip
import json
import random
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from benchmarks.measuring.provenance import commit
from mixencoder import MixEncoder
from mixencoder.evaluation.files import write_text
from mixencoder.evaluation.measures import RankingMeasures
from mixencoder.evaluation.model_scores import score_candidates, strict_ranking
from mixencoder.evaluation.tasks import RankingTask, read_tasks
from mixencoder.modeling import MixEncoderModel

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
POOLS = ("free/foldoc.jsonl.gz", "pairs/quora.dev.jsonl.gz")
"""Files of pairs: every query ranks the positives of all pairs."""
LISTS = ("answers/wikiqa.dev.jsonl.gz", "dialogue/mutual.dev.jsonl.gz", "dialogue/dailydialogpp.dev.jsonl.gz")
QUERIES, POOL, SEED = 200, 600, 0
MAX_DOCUMENT_TOKENS = 128
MEASURE = "nDCG@10"


def pool_task(path: Path) -> RankingTask:
    """Make a ranking task from a file of pairs: every query ranks the documents of all drawn pairs."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = random.Random(SEED).sample([json.loads(line) for line in file], POOL)
    documents = list(dict.fromkeys(row["positive"] for row in rows))
    position = {text: number for number, text in enumerate(documents)}
    queries = rows[:QUERIES]
    return RankingTask(
        name=path.name.partition(".")[0],
        source=path,
        files=(path,),
        queries=[row["query"] for row in queries],
        query_ids=[str(number) for number in range(len(queries))],
        documents=documents,
        candidates=[list(range(len(documents)))] * len(queries),
        document_ids=[[str(number) for number in range(len(documents))]] * len(queries),
        qrels=[{str(position[row["positive"]]): 1} for row in queries],
    )


def figures_by_share(task: RankingTask, parts: Mapping[str, list[Tensor]]) -> dict[float, float]:
    """Return {share of the interaction: figure} from the two terms of the score."""
    measure = RankingMeasures([MEASURE], task.qrels)
    found = {}
    for share in SHARES:
        rankings = [
            strict_ranking(ids, (share * interaction + dual).tolist(), grades)
            for ids, grades, interaction, dual in zip(
                task.document_ids, task.qrels, parts["interaction"], parts["dual"], strict=True
            )
        ]
        found[share] = measure(rankings)[MEASURE].value
    return found


def scale_interaction(model: MixEncoderModel, share: float) -> None:
    """Multiply ``h . e`` by share > 0 in the weights, without changing anything else that the model computes.

    h and e come from the last LayerNorm; each gets the square root as a factor, which a classification head divides by.
    """
    root, d = share**0.5, model.config.hidden_size
    with torch.no_grad():
        for parameter in model.interaction[-1].output_norm.parameters():
            parameter.mul_(root)
        if model.classifier is not None:
            # [h ; e ; |h - e| ; ...]
            model.classifier.dense.weight[:, : 3 * d].div_(root)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint.share", description=__doc__)
    parser.add_argument("--model", required=True, help="trained checkpoint with the dual term, J = 1")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data, and free/")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint with the chosen share")
    options = parser.parse_args()
    engine = MixEncoder.from_pretrained(options.model)
    reader = engine.with_limits(max_document_length=MAX_DOCUMENT_TOKENS)
    tasks = [pool_task(options.data_dir / name) for name in POOLS]
    tasks += read_tasks([options.data_dir / name for name in LISTS], limit=QUERIES, sample=SEED)
    quiet = {"batch_size": 32, "show_progress_bar": False}
    found = {}
    for task in tasks:
        found[task.name] = figures_by_share(task, score_candidates(reader, task, ("interaction", "dual"), quiet))
        print(task.name, {share: round(value, 4) for share, value in found[task.name].items()}, flush=True)
    means = {share: mean(figures[share] for figures in found.values()) for share in SHARES}
    # without any interaction this would be another architecture
    chosen = max((share for share in SHARES if share > 0), key=means.get)
    scale_interaction(engine.model, chosen)
    engine.save_pretrained(options.output)
    record = {"measure": MEASURE, "queries": QUERIES, "pool": POOL, "seed": SEED, "commit": commit()}
    record |= {"figures": found, "means": means, "chosen": chosen}
    write_text(options.output / "share.json", json.dumps(record, indent=1) + "\n")
    print(f"chosen {chosen}: {means}")


if __name__ == "__main__":
    main()
