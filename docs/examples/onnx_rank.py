"""Rank texts with an exported model: onnxruntime, tokenizers and numpy alone, without PyTorch.

Make the folder once, on any machine that has mixencoder (docs/onnx.md):

    mixencoder export --format onnx exported

Then: python onnx_rank.py exported "How do I undo a commit?" candidates.txt
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class OnnxRanker:
    """The three graphs of a folder: candidates are encoded ahead of time, a query when it arrives."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.settings = json.loads((folder / "mixencoder.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # the settings say how texts are cut
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        names = ("encode_document", "encode_query", "score")
        self.graphs = {name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx")) for name in names}

    def encode_document(self, texts: list[str], batch_size: int = 16) -> np.ndarray:
        """Return contexts (N, k, d); keep them, for example with np.save."""
        rows = self._tokens(texts, self.settings["max_document_tokens"], "right")
        # texts of like length together, so that little of a batch is padding
        order = np.argsort([len(row) for row in rows], kind="stable")
        out = np.empty((len(texts), *self.settings["context_shape"]), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            (out[chosen],) = self._run("encode_document", self._batch([rows[number] for number in chosen]))
        return out

    def score(self, query: str, contexts: np.ndarray) -> np.ndarray:
        """Return the scores (N,) of candidates that encode_document made."""
        side = self.settings["query_truncation_side"]
        batch = self._batch(self._tokens([query], self.settings["max_query_tokens"], side))
        state = dict(zip(self.settings["state"], self._run("encode_query", batch), strict=True))
        (scores,) = self._run("score", {"query_mask": batch["attention_mask"], "contexts": contexts, **state})
        return scores[0]

    def _tokens(self, texts: list[str], most: int, side: str) -> list[list[int]]:
        prefix, suffix = self.settings["prefix"], self.settings["suffix"]
        room = most - len(prefix) - len(suffix)
        found = [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        return [[*prefix, *(ids[:room] if side == "right" else ids[-room:]), *suffix] for ids in found]

    def _batch(self, rows: list[list[int]]) -> dict[str, np.ndarray]:
        ids = np.full((len(rows), max(map(len, rows))), self.settings["pad"], dtype=np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    def _run(self, graph: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        # a graph lacks inputs that its model does not read
        wanted = [entry.name for entry in self.graphs[graph].get_inputs()]
        return self.graphs[graph].run(None, {name: inputs[name] for name in wanted})


def main() -> None:
    """Print the best five lines of a file."""
    folder, query, file = sys.argv[1:]
    texts = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    ranker = OnnxRanker(folder)
    scores = ranker.score(query, ranker.encode_document(texts))
    for number in np.argsort(-scores, kind="stable")[:5]:
        print(f"{scores[number]:8.3f}  {texts[number]}")


if __name__ == "__main__":
    main()
