"""MTEB: `MixEncoderCrossEncoder` follows its protocol for cross-encoders, which its reranking tasks call."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixencoder.base.encoding import EncodingEngine
from mixencoder.integrations.shared import Model, engine_of, missing, name_of

try:
    from mteb.models import ModelMeta
except ImportError as error:
    raise missing("mteb", error) from error


class MixEncoderCrossEncoder:
    """Score the pairs of a task. Every query and every document is encoded once, however its pairs are ordered.

    Args:
        model_name: an engine, the directory or hub id of a checkpoint, or None for the bundled default.
        revision: stored in the results, next to the name.
        device: as in `MixEncoder.from_pretrained`.
        options: dtype, as in `MixEncoder.from_pretrained`.
    """

    def __init__(
        self, model_name: Model = None, revision: str | None = None, device: str | None = None, **options: Any
    ) -> None:
        self.engine = engine_of(model_name, device=device, **options)
        # results are stored under "organisation/name"
        name = name_of(model_name) or "bundled"
        name = name if name.count("/") == 1 and not Path(name).exists() else f"mixencoder/{Path(name).name}"
        self._meta = ModelMeta.create_empty({"name": name, "revision": revision})

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Name and revision of the model."""
        return self._meta

    def predict(
        self, inputs1: Iterable[Any], inputs2: Iterable[Any], *, batch_size: int = 32, **options: Any
    ) -> np.ndarray:
        """Return the scores (n,) of n pairs.

        Args:
            inputs1: batches of queries, each with a list "text"; a query comes once for each of its documents.
            inputs2: batches of documents, likewise.
            batch_size: texts encoded at once.
            options: what else MTEB passes: about the task, which is not used, and show_progress_bar.
        """
        queries = [text for batch in inputs1 for text in batch["text"]]
        documents = [text for batch in inputs2 for text in batch["text"]]
        progress = {"batch_size": batch_size, "show_progress_bar": options.get("show_progress_bar")}
        engine = self.engine
        if not isinstance(engine, EncodingEngine):
            return engine.predict(list(zip(queries, documents, strict=True)), head="ranking", **progress)
        number_of = {text: number for number, text in enumerate(dict.fromkeys(documents))}
        encoded = engine.encode_document(list(number_of), **progress)
        rows_of: dict[str, list[int]] = {}
        for row, (query, _) in enumerate(zip(queries, documents, strict=True)):
            rows_of.setdefault(query, []).append(row)
        scores = np.empty(len(queries), dtype=np.float32)
        for query, rows in rows_of.items():
            chosen = torch.tensor([number_of[documents[row]] for row in rows], device=engine.device)
            scores[rows] = engine.interact(engine.encode_query(query), encoded[chosen])[0].cpu().numpy()
        return scores
