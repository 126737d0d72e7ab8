"""Train the classification head alone: ``python -m benchmarks.checkpoint.second_head --model CHOSEN --output FINAL``.

Everything below the head stays unchanged, so rankings keep their bits, and the head's inputs are computed only once.
The epoch is chosen on pairs held out of the training data. Writes the checkpoint FINAL, and a record of the training
to FINAL/head.json.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measuring.provenance import commit
from mixencoder import MixEncoder
from mixencoder.base.modeling import PairClassifier
from mixencoder.base.tokenization import pad
from mixencoder.data.examples import Example, read_source
from mixencoder.evaluation.files import write_text

DATA = {"nli/mnli_mismatched.train.jsonl.gz": 2.0, "nli/snli.train.jsonl.gz": 1.0, "nli/joci.train.jsonl.gz": 0.5}
"""File of labelled pairs -> weight of its pairs in the loss. The epoch is chosen on held-out pairs of the first."""
HELD_OUT, SEED = 1000, 0
EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 12, 128, 3e-4, 0.05
MAX_TOKENS = 96


def head_inputs(engine: MixEncoder, examples: Sequence[Example], batch_size: int = 64) -> Tensor:
    """Inputs of the classification head for each pair, (R, 6 d) float32."""
    model = engine.model
    width = 6 * model.config.hidden_size
    found = torch.empty(len(examples), width)
    queries = engine.read_query([example.query for example in examples])
    documents = engine.read_document([example.positives[0] for example in examples])
    by_length = sorted(range(len(examples)), key=lambda row: len(queries[row]) + len(documents[row]))
    taken: list[Tensor] = []
    hook = model.classifier.dense.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    pad_id = engine.tokenizer.pad_token_id
    with torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            rows = by_length[start : start + batch_size]
            texts = (pad([of[row] for row in rows], pad_id) for of in (queries, documents))
            model(*(tensor for text in texts for tensor in text), candidates_per_query=1, head="classification")
            found[rows] = taken.pop().view(-1, width)
    hook.remove()
    return found


def train_head(
    head: PairClassifier, inputs: Tensor, targets: Tensor, weights: Tensor, held_out: tuple[Tensor, Tensor]
) -> list[float]:
    """Train a head, restore the weights of its best epoch, and return every epoch's accuracy.

    Args:
        head: reads rows (6 d); inputs are scaled to unit variance for training; the scale is folded into its weights.
        inputs: (R, 6 d).
        targets, weights: (R,), class numbers and weights of the rows in the loss.
        held_out: inputs and targets that the epoch is chosen on.
    """
    mean, scale = inputs.mean(dim=0), inputs.std(dim=0).clamp_min(1e-6)
    layers = nn.Sequential(head.dense, nn.ReLU(), head.dropout, head.out_proj)
    optimiser = torch.optim.AdamW(layers.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(inputs) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=steps)
    chance = torch.Generator().manual_seed(SEED)
    accuracies, best = [], None
    for _ in range(EPOCHS):
        layers.train()
        for rows in torch.randperm(len(inputs), generator=chance).split(BATCH_SIZE):
            logits = layers((inputs[rows] - mean) / scale)
            loss = (F.cross_entropy(logits, targets[rows], reduction="none") * weights[rows]).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        layers.eval()
        with torch.inference_mode():
            right = layers((held_out[0] - mean) / scale).argmax(dim=-1) == held_out[1]
        accuracies.append(right.float().mean().item())
        if accuracies[-1] == max(accuracies):
            best = copy.deepcopy(head.state_dict())
    head.load_state_dict(best)
    with torch.no_grad():
        # dense((x - mean) / scale) as one layer
        head.dense.weight.div_(scale)
        head.dense.bias.sub_(head.dense.weight @ mean)
    return accuracies


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint.second_head", description=__doc__)
    parser.add_argument(
        "--model", required=True, help='checkpoint with a classification head; "bundled" for the default'
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the public data")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint with the trained head")
    options = parser.parse_args()
    engine = MixEncoder.from_pretrained(None if options.model == "bundled" else options.model)
    reader = engine.with_limits(max_query_length=MAX_TOKENS, max_document_length=MAX_TOKENS)
    sources = [
        read_source(options.data_dir / path, weight=weight, label2id=engine.config.class_numbers)
        for path, weight in DATA.items()
    ]
    examples = [example for source in sources for example in source.examples]
    weights = torch.tensor([source.weight for source in sources for _ in source.examples])
    targets = torch.tensor([int(example.target) for example in examples])
    inputs = head_inputs(reader, examples)
    order = torch.randperm(len(sources[0].examples), generator=torch.Generator().manual_seed(SEED))
    kept = torch.ones(len(examples), dtype=torch.bool)
    kept[order[:HELD_OUT]] = False
    torch.manual_seed(SEED)
    head = PairClassifier(engine.config.hidden_size, engine.config, pairs=2 if engine.config.dual_term else 1)
    accuracies = train_head(head, inputs[kept], targets[kept], weights[kept], (inputs[~kept], targets[~kept]))
    engine.model.classifier.load_state_dict(head.state_dict())
    engine.model.half()
    engine.save_pretrained(options.output)
    record = {"data": DATA, "pairs": int(kept.sum()), "held_out": HELD_OUT, "held_out_accuracy": accuracies}
    record |= {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "seed": SEED}
    record |= {"commit": commit()}
    write_text(options.output / "head.json", json.dumps(record, indent=1) + "\n")
    print(f"held out accuracy by epoch: {accuracies}")


if __name__ == "__main__":
    main()
