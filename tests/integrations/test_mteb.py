"""MTEB's reranking tasks run with our model, and every text is encoded once."""

import numpy as np
import pytest

from mixencoder import MixEncoder
from mixencoder.peers import CrossEncoder

pytest.importorskip("mteb", reason="mteb is not installed")

import mteb
from mteb.mocks.mock_tasks.reranking import MockRerankingTask
from mteb.models.models_protocols import CrossEncoderProtocol

from mixencoder.integrations.mteb import MixEncoderCrossEncoder
from tests.integrations.texts import TEXTS

QUERIES = ["how to cook rice", "how to undo a commit"]


def batches(texts):
    return [{"text": texts[start : start + 3]} for start in range(0, len(texts), 3)]


@pytest.mark.parametrize("kind", ["mixencoder", "cross-encoder"])
def test_pairs_in_any_order_are_scored_as_by_the_model(model, backbone_path, kind, monkeypatch):
    engine = model if kind == "mixencoder" else CrossEncoder.from_backbone(backbone_path)
    adapter = MixEncoderCrossEncoder(engine)
    assert isinstance(adapter, CrossEncoderProtocol)
    pairs = [(query, text) for text in TEXTS for query in QUERIES]
    expected = engine.predict(pairs)
    encoded = []
    if kind == "mixencoder":
        monkeypatch.setattr(MixEncoder, "encode_query", counted(MixEncoder.encode_query, encoded))
        monkeypatch.setattr(MixEncoder, "encode_document", counted(MixEncoder.encode_document, encoded))
    queries, documents = batches([query for query, _ in pairs]), batches([text for _, text in pairs])
    scores = adapter.predict(queries, documents, task_metadata=None, hf_split="test", hf_subset="default")
    assert np.array_equal(scores, expected)
    if kind == "mixencoder":
        assert sorted(encoded) == sorted([*QUERIES, *TEXTS])


def counted(method, encoded):
    def run(self, texts, **options):
        encoded.extend([texts] if isinstance(texts, str) else texts)
        return method(self, texts, **options)

    return run


def test_a_task_runs(checkpoint, model):
    adapter = MixEncoderCrossEncoder(checkpoint, revision="1")
    assert adapter.mteb_model_meta.name == "mixencoder/model"
    results = mteb.evaluate(adapter, tasks=[MockRerankingTask()], cache=None)
    (scores,) = results.task_results[0].scores["test"]
    assert 0 < scores["main_score"] <= 1
