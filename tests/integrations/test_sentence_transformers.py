"""sentence-transformers' evaluators take our engines, and its models serve as backbones."""

import numpy as np
import pytest
import torch

from mixencoder import InputError, MixEncoder
from mixencoder.integrations.sentence_transformers import AsCrossEncoder
from mixencoder.peers import DualEncoder

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from sentence_transformers import SentenceTransformer
from sentence_transformers.cross_encoder import evaluation
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from tests.integrations.texts import QUERY, TEXTS


def test_the_reranking_evaluator_measures_our_ranking(model, tmp_path):
    # the document that the model ranks second is the right one
    second = TEXTS[model.rank(QUERY, TEXTS)[1]["corpus_id"]]
    samples = [{"query": QUERY, "positive": [second], "negative": [text for text in TEXTS if text != second]}]
    adapter = AsCrossEncoder(model)
    results = evaluation.CrossEncoderRerankingEvaluator(samples, name="own")(adapter, str(tmp_path))
    assert results["own_mrr@10"] == 0.5
    assert adapter.metrics["own_mrr@10"] == results["own_mrr@10"]


def test_the_other_evaluators_measure_our_scores(model):
    pairs = [[QUERY, text] for text in TEXTS]
    scores = model.predict(pairs)
    correlation = evaluation.CrossEncoderCorrelationEvaluator(pairs, scores.tolist(), name="own")
    assert correlation(AsCrossEncoder(model))["own_spearman"] == pytest.approx(1)
    binary = (scores > np.median(scores)).astype(int).tolist()
    classes = evaluation.CrossEncoderClassificationEvaluator(pairs, binary, name="own")
    assert classes(AsCrossEncoder(model))["own_average_precision"] == pytest.approx(1)
    engine = model.with_head("classification", ["no", "maybe", "yes"])
    adapter = AsCrossEncoder(engine, head="classification")
    labels = engine.predict(pairs, head="classification").argmax(axis=1).tolist()
    several = evaluation.CrossEncoderClassificationEvaluator(pairs, labels, name="own")
    assert adapter.num_labels == 3
    assert several(adapter)["own_f1_micro"] == 1


def test_arguments_mean_what_they_mean_there(model):
    adapter = AsCrossEncoder(model, activation_fn=torch.sigmoid)
    pairs = [(QUERY, text) for text in TEXTS]
    expected = torch.from_numpy(model.predict(pairs))
    assert np.array_equal(adapter.predict(pairs), torch.sigmoid(expected).numpy())
    assert torch.equal(adapter.predict(pairs, None, None, 2, False, torch.tanh, True, True, True), expected.tanh())
    assert adapter.rank(QUERY, TEXTS, 2, True)[0]["text"] in TEXTS
    with pytest.raises(InputError, match="prompt_name is 'query'"):
        adapter.predict(pairs, "query")
    with pytest.raises(InputError, match="device is 'cpu'"):
        adapter.rank(QUERY, TEXTS, device="cpu")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_model_that_it_saved_is_a_backbone_with_its_pooling(backbone_path, tmp_path, pooling):
    transformer = Transformer(str(backbone_path))
    modules = [transformer, Pooling(32, pooling_mode=pooling), Normalize()]
    theirs = SentenceTransformer(modules=modules, device="cpu")
    theirs.save_pretrained(str(tmp_path / "saved"))
    expected = theirs.similarity(theirs.encode([QUERY]), theirs.encode(TEXTS)).numpy()
    ours = DualEncoder.from_backbone(tmp_path / "saved")
    found = ours.interact(ours.encode_query([QUERY]), ours.encode_document(TEXTS)).numpy()
    assert np.abs(found / ours.model.scale.item() - expected).max() < 1e-5
    # the dual term is the same cosine, times its scale
    mix = MixEncoder.from_backbone(tmp_path / "saved", dual_term=True)
    dual = mix.predict([(QUERY, text) for text in TEXTS], score="dual")
    assert np.abs(dual / mix.model.dual_scale.item() - expected[0]).max() < 1e-5
