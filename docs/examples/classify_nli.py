"""Decide whether one sentence follows from another: ``python docs/examples/classify_nli.py``.

Natural language inference: a premise entails a hypothesis, contradicts it, or neither. The bundled model has a
classification head for this, in addition to its ranking head. Runs offline.
"""

import numpy as np

from mixencoder import MixEncoder

PREMISE = "A man in a red jacket is playing a guitar on a crowded square."
HYPOTHESES = [
    "A man is making music.",
    "Nobody is on the square.",
    "The man is a famous musician.",
    "Somebody wears a red jacket.",
    "The man is asleep in his bed.",
    "The crowd is waiting for a parade.",
]


def main() -> None:
    """Print the probability of every class for every hypothesis."""
    model = MixEncoder.from_pretrained()
    logits = model.predict([(PREMISE, hypothesis) for hypothesis in HYPOTHESES], head="classification")
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = odds / odds.sum(axis=1, keepdims=True)
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    print(PREMISE + "\n")
    print("".join(f"{name:>15}" for name in names))
    for hypothesis, row in zip(HYPOTHESES, probabilities, strict=True):
        print("".join(f"{value:15.0%}" for value in row), f"  {names[row.argmax()]:15}{hypothesis}")


if __name__ == "__main__":
    main()
