"""Write lists graded by a larger encoder, for ``mixencoder train``.

``python -m benchmarks.interaction.taught_lists --features FEATURES --output FOLDER``. A query's list holds a right
document, the most similar wrong ones, and some of other queries. Its labels are the teacher's cosines, scaled, with a
bonus for documents that are known to be right; ``train`` learns them as grades (ListNet), so that a wrong document that
the teacher finds right counts as such. Writes one file for each source.
"""

import argparse
import gzip
import json
import random
from pathlib import Path

import torch

from benchmarks.interaction.encodings import Lists
from mixencoder.durable import replacing

SEED = 0
SCALE = 20.0
"""Factor of the cosines: a difference of 0.05 is a factor e of the softmax."""
BONUS = 2.0
"""Added to the grade of a right document."""
MINED, OTHERS = 6, 3
"""Wrong documents of a list."""


def graded_rows(lists: Lists, teacher: tuple[torch.Tensor, torch.Tensor]) -> list[dict]:
    """Return rows of query, candidates and labels for every query of a source."""
    assert lists.mined is not None, "sources have mined documents"
    assert lists.texts is not None, "features keep the texts"
    chance, rows = random.Random(SEED), []
    query_texts, document_texts = lists.texts
    query_vectors, document_vectors = (vectors.float() for vectors in teacher)
    for number, (candidates, grades) in enumerate(zip(lists.candidates, lists.grades, strict=True)):
        right = [document for document, grade in zip(candidates, grades, strict=True) if grade]
        listed = [document for document, grade in zip(candidates, grades, strict=True) if not grade]
        wrong = chance.sample(listed, min(MINED // 2, len(listed)))
        wrong += [document for document in lists.mined[number].tolist() if document not in wrong][: MINED - len(wrong)]
        wrong += [
            document for document in chance.choices(range(len(document_texts)), k=OTHERS) if document not in right
        ]
        chosen = list(dict.fromkeys([chance.choice(right), *wrong]))
        cosines = document_vectors[chosen] @ query_vectors[number]
        labels = SCALE * cosines + BONUS * torch.tensor([float(document in right) for document in chosen])
        labels -= labels.min()
        rows.append(
            {
                "query": query_texts[number],
                "candidates": [document_texts[document] for document in chosen],
                "labels": [round(label, 3) for label in labels.tolist()],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interaction.taught_lists", description=__doc__)
    parser.add_argument("--features", type=Path, required=True, help="folder that `features` and `teacher` wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for the lists")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for path in sorted(options.features.glob("teacher.train.*.pt")):
        name = path.stem.removeprefix("teacher.train.")
        lists = torch.load(options.features / f"train.{name}.pt", weights_only=False)
        rows = graded_rows(lists, torch.load(path))
        with replacing(options.output / f"{name}.jsonl.gz") as draft, gzip.open(draft, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"{name}: {len(rows)} lists", flush=True)


if __name__ == "__main__":
    main()
