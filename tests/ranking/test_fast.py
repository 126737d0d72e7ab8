"""`MixEncoder`: rankings, predictions, what bad input gets, and scores that do not notice their neighbours."""

import threading
import warnings

import numpy as np
import pytest
import torch
from transformers import BertConfig, MPNetConfig, MPNetModel

from mixencoder import MixEncoder
from mixencoder.base.encoder_passes import PASS_TOKENS, STEP
from mixencoder.errors import (
    CheckpointError,
    InputError,
    NonFiniteError,
    TruncationWarning,
    UnsupportedBackboneError,
)
from mixencoder.ranking.pairs import CHUNK, PairScorer
from mixkernels import BackendError

DOCUMENTS = ["cook the rice in a pot", "undo the git commit", "paris is the capital of france", "the cat sat"]


@pytest.fixture(scope="module")
def model(backbone_path) -> MixEncoder:
    torch.manual_seed(1)
    return MixEncoder.from_backbone(
        backbone_path, num_context_embeddings=2, heads=("ranking", "classification"), num_labels=3, dual_term=True
    )


def many_texts(words, count: int, seed: int = 0) -> list[str]:
    chance = np.random.default_rng(seed)
    return [" ".join(chance.choice(words, chance.integers(1, 30))) for _ in range(count)]


def test_rank_returns_every_candidate_best_first(model):
    ranking = model.rank("how to undo a commit", DOCUMENTS)
    assert sorted(entry["corpus_id"] for entry in ranking) == [0, 1, 2, 3]
    scores = [entry["score"] for entry in ranking]
    assert scores == sorted(scores, reverse=True)
    assert set(ranking[0]) == {"corpus_id", "score"}
    assert len(set(scores)) == 4


def test_rank_options(model):
    ranking = model.rank("boil water", DOCUMENTS, top_k=2, ids=["a", "b", "c", "d"], return_documents=True)
    assert len(ranking) == 2
    for entry in ranking:
        assert entry["text"] == DOCUMENTS[entry["corpus_id"]]
        assert entry["id"] == "abcd"[entry["corpus_id"]]
    assert len(model.rank("boil water", DOCUMENTS, top_k=99)) == 4
    probability = model.rank("boil water", DOCUMENTS, activation_fn=torch.sigmoid)
    assert all(0 <= entry["score"] <= 1 for entry in probability)


def test_ties_go_to_the_lower_corpus_id(model):
    ranking = model.rank("the dog", ["the cat", "the rice", "the cat", "the rice", "the cat"])
    for text in ([0, 2, 4], [1, 3]):
        places = [entry["corpus_id"] for entry in ranking if entry["corpus_id"] in text]
        assert places == text
        assert len({entry["score"] for entry in ranking if entry["corpus_id"] in text}) == 1


def test_several_queries_give_a_ranking_each(model):
    queries = ["boil water", "undo the commit", "the capital"]
    assert model.rank(queries, DOCUMENTS) == [model.rank(query, DOCUMENTS) for query in queries]
    assert len(model.rank(queries[:1], DOCUMENTS)) == 1


def test_rank_predict_and_interact_agree_to_the_last_bit(model):
    query = "how to cook rice"
    ranked = {entry["corpus_id"]: entry["score"] for entry in model.rank(query, DOCUMENTS)}
    predicted = model.predict([(query, document) for document in DOCUMENTS])
    interacted = model.interact(model.encode_query(query), model.encode_document(DOCUMENTS))
    assert interacted.shape == (1, 4)
    assert predicted.dtype == np.float32
    assert predicted.tolist() == interacted[0].tolist() == [ranked[i] for i in range(4)]
    assert model.rank(query, model.encode_document(DOCUMENTS)) == model.rank(query, DOCUMENTS)


def test_scores_equal_the_models_own_forward(model):
    queries, documents = ["how to cook rice", "the cat"], DOCUMENTS
    ids = [torch.tensor([row]) for row in model.read_query(queries)]
    rows = [torch.tensor([row]) for row in model.read_document(documents)]
    got = model.interact(model.encode_query(queries), model.encode_document(documents))
    with torch.no_grad():
        for b, query in enumerate(ids):
            for n, document in enumerate(rows):
                want = model.model(query, torch.ones_like(query), document, torch.ones_like(document)).full
                torch.testing.assert_close(got[b, n], want[0, 0], rtol=1e-5, atol=1e-4)


def test_predict_forms(model):
    pairs = [("boil water", DOCUMENTS[0]), ("undo", DOCUMENTS[1]), ("boil water", DOCUMENTS[2])]
    scores = model.predict(pairs)
    assert scores.shape == (3,)
    one = model.predict(pairs[1])
    assert float(one) == scores[1]
    logits = model.predict(pairs, head="classification")
    assert logits.shape == (3, 3)
    assert logits.dtype == np.float32
    probabilities = model.predict(pairs, head="classification", activation_fn=lambda x: x.softmax(-1))
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    assert isinstance(model.predict(pairs, convert_to_tensor=True), torch.Tensor)
    assert isinstance(model.predict(pairs, convert_to_numpy=False), list)
    assert model.predict([]).shape == (0,)
    assert model.predict([], head="classification").shape == (0, 3)
    full, parts = model.predict(pairs), [model.predict(pairs, score=part) for part in ("interaction", "dual")]
    np.testing.assert_allclose(full, parts[0] + parts[1], rtol=1e-6)


def test_the_dual_score_alone_takes_no_interaction(backbone_path, monkeypatch):
    model = MixEncoder.from_backbone(backbone_path, dual_term=True)
    queries, candidates = model.encode_query(["boil water", "undo"]), model.encode_document(DOCUMENTS)
    full, interaction = (model.interact(queries, candidates, score=part) for part in ("full", "interaction"))
    monkeypatch.setattr(model.model, "run_interaction", None)
    torch.testing.assert_close(model.interact(queries, candidates, score="dual"), full - interaction)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_score_is_the_same_bit_for_bit_whatever_n_order_chunking_and_neighbours(backbone_path, words, threads, dtype):
    torch.manual_seed(1)
    model = MixEncoder.from_backbone(backbone_path, num_context_embeddings=2, interaction_layers=(1, -1), dtype=dtype)
    texts = many_texts(words, 3 * CHUNK + 5)
    queries = ["how to cook rice", "the dog sat in the pot", "git", "how to undo a git commit in paris"]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        crowd = model.interact(model.encode_query(queries), model.encode_document(texts, batch_size=7))
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
        shuffled = model.interact(
            model.encode_query(queries[2:3]), model.encode_document([texts[i] for i in order], batch_size=64)
        )
        assert torch.equal(shuffled[0], crowd[2, order])
        pairs = [(queries[i % 4], texts[i]) for i in range(0, len(texts), 3)]
        predicted = model.predict(pairs)
        assert predicted.tolist() == [crowd[i % 4, i].item() for i in range(0, len(texts), 3)]
        for i in (0, CHUNK - 1, CHUNK, len(texts) - 1):
            assert model.predict((queries[1], texts[i])) == crowd[1, i].item()
        assert len(crowd.unique()) > 0.9 * crowd[:, ::1].unique(dim=1).numel()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layers", [(-1,), (0, 1, -1)])
@pytest.mark.parametrize("holds", [(), (96,)])
def test_where_no_chunk_keeps_bits_together_every_candidate_attends_alone(
    backbone_path, words, layers, holds, monkeypatch
):
    torch.manual_seed(1)
    model = MixEncoder.from_backbone(backbone_path, num_context_embeddings=2, interaction_layers=layers)
    queries, documents = model.encode_query(["how to cook rice", "git"]), model.encode_document(many_texts(words, 150))
    want = model.interact(queries, documents)
    monkeypatch.setattr(PairScorer, "_keeps_bits", lambda self, length, size, together: size in holds and not together)
    monkeypatch.setattr(model, "_pair_scorer", PairScorer(model.model))
    torch.testing.assert_close(model.interact(queries, documents), want)
    assert model._pair_scorer._chunk_size() == (holds or (CHUNK,))[0]


def test_equal_texts_are_encoded_once(model, monkeypatch):
    seen = []
    encode = model.model.encode_document
    monkeypatch.setattr(model.model, "encode_document", lambda ids, mask: seen.append(len(ids)) or encode(ids, mask))
    model.rank("rice", ["the cat sat in a pot the cat sat in a pot the cat sat in a pot the cat sat in a pot"] * 50)
    # the text, and what may fill its pass up to a shape that keeps bits
    assert len(seen) == 1
    assert seen[0] <= PASS_TOKENS // STEP


def test_threads_give_the_same_answers(model):
    want = model.rank("how to cook rice", DOCUMENTS)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(model.rank("how to cook rice", DOCUMENTS))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [want] * 6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.rank([], DOCUMENTS), "query is empty"),
        (lambda m: m.encode_query([]), "query is empty"),
        (lambda m: m.rank("a", []), "documents is empty"),
        (lambda m: m.rank("a", ["the cat", 3]), "document 1 is a int; expected a string"),
        (lambda m: m.rank("a", ["the cat", None]), "document 1 is a NoneType"),
        (lambda m: m.rank("a", ["the cat", ["x"]]), "document 1 is a list; expected a string"),
        (lambda m: m.rank(7, ["the cat"]), "query is a int; expected a string or a list"),
        (lambda m: m.rank("a", {"the cat"}), "documents is a set; expected a string or a list"),
        (lambda m: m.rank("a", ["the cat"], top_k=0), "top_k is 0; expected a positive integer"),
        (lambda m: m.rank("a", ["the cat"], ids=["x", "y"]), "ids names 2 documents but there are 1"),
        (lambda m: m.rank("a", ["the cat"], batch_size=0), "batch_size is 0"),
        (lambda m: m.rank("a", ["the cat"], score="cosine"), "score is 'cosine'; expected one of full"),
        (lambda m: m.rank("a", torch.zeros(3, 5, 32)), r"\(3, 5, 32\); expected context embeddings \(N, 2, 32\)"),
        (lambda m: m.rank("a", torch.zeros(3, 2, 32), return_documents=True), "return_documents needs texts"),
        (lambda m: m.predict([("a", "b", "c")]), "pair 0 is .*; expected"),
        (lambda m: m.predict(["ab"]), "pair 0 is 'ab'"),
        (lambda m: m.predict([("a", "the cat"), (5, "the cat")]), "query 1 is a int"),
        (lambda m: m.predict([("a", "the cat")], head="regression"), "no head 'regression'; its heads are ranking"),
        (lambda m: m.interact(m.encode_query("a"), [1, 2]), "candidates are list"),
    ],
)
def test_bad_input_gets_a_clear_error(model, call, words):
    with pytest.raises(InputError, match=words):
        call(model)


def test_long_texts_are_cut_by_tokens_and_counted_once(model):
    long = "rice " * 60
    with pytest.warns(
        TruncationWarning, match="2 of 3 documents are longer than 40 tokens; their start was kept"
    ) as seen:
        model.encode_document([long, "the cat", long + "dog"])
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_document(["the cat"])


def test_a_dialogue_keeps_its_last_turns(backbone_path):
    options = {"max_query_length": 6, "dual_term": True}
    left = MixEncoder.from_backbone(backbone_path, query_truncation_side="left", **options)
    with pytest.warns(TruncationWarning, match="1 of 1 queries are longer than 6 tokens; their end was kept"):
        (row,) = left.read_query(["cook rice in a pot undo git commit"])
    assert row == left.read_query(["pot undo git commit"])[0]
    right = MixEncoder.from_backbone(backbone_path, **options)
    with pytest.warns(TruncationWarning):
        (row,) = right.read_query(["cook rice in a pot undo git commit"])
    assert row == right.read_query(["cook rice in a"])[0]


def test_with_limits_leaves_the_model_alone(model):
    short = model.with_limits(max_document_length=5)
    assert short.read_document.max_length == 5
    assert model.read_document.max_length == 40
    assert short.model is model.model
    with pytest.raises(InputError, match="max_query_length is 41; expected 3 to 40 tokens"):
        model.with_limits(max_query_length=41)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "warp"}, "device 'warp' cannot be used here"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"dtype": "float8"}, "dtype 'float8' cannot be used; expected one of float32"),
        ({"dtype": torch.int32}, "expected one of float32"),
    ],
)
def test_a_device_or_dtype_that_does_not_exist(backbone_path, options, words):
    with pytest.raises(InputError, match=words):
        MixEncoder.from_backbone(backbone_path, **options)


def test_a_backend_that_does_not_exist(backbone_path):
    with pytest.raises(BackendError, match="no backend 'cutlass'"):
        MixEncoder.from_backbone(backbone_path, backend="cutlass")


def test_dtype_and_backend_are_what_was_asked_for(backbone_path):
    torch.manual_seed(1)
    low = MixEncoder.from_backbone(backbone_path, dtype=torch.bfloat16, backend="reference", dual_term=True)
    assert (low.dtype, low.backend, low.device.type) == (torch.bfloat16, "reference", low.model.device.type)
    torch.manual_seed(1)
    full = MixEncoder.from_backbone(backbone_path, dual_term=True)
    query = "how to cook rice"
    a, b = (np.array([model.predict((query, text)) for text in DOCUMENTS]) for model in (low, full))
    assert a.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=0.1, atol=0.5)
    torch.manual_seed(1)
    reference = MixEncoder.from_backbone(backbone_path, backend="reference", dual_term=True)
    np.testing.assert_allclose([reference.predict((query, text)) for text in DOCUMENTS], b, rtol=1e-5, atol=1e-5)


def test_saving_and_loading(model, tmp_path, backbone_path):
    path = tmp_path / "saved"
    model.save_pretrained(path)
    again = MixEncoder.from_pretrained(path)
    assert again.rank("boil water", DOCUMENTS) == model.rank("boil water", DOCUMENTS)
    again.save_pretrained(path)  # over what is there
    assert MixEncoder.from_pretrained(str(path)).rank("boil water", DOCUMENTS) == model.rank("boil water", DOCUMENTS)
    assert not [file for file in tmp_path.iterdir() if file != path]
    assert not list(path.glob("*.bin"))


def test_checkpoints_that_cannot_be_loaded(model, tmp_path, backbone_path):
    with pytest.raises(CheckpointError, match=r'holds a model of type "bert"; expected "mixencoder".*from_backbone'):
        MixEncoder.from_pretrained(backbone_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        MixEncoder.from_pretrained(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        MixEncoder.from_pretrained(tmp_path / "empty")
    path = tmp_path / "damaged"
    model.save_pretrained(path)
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        MixEncoder.from_pretrained(path)
    weights.write_bytes(whole)
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        MixEncoder.from_pretrained(path)


def test_missing_weights_are_an_error_and_not_random_numbers(model, tmp_path):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["gate.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"gate\.weight"):
        MixEncoder.from_pretrained(tmp_path)


def test_other_encoders_are_refused(tmp_path, tokenizer):
    config = MPNetConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    MPNetModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBackboneError, match=r'"mpnet" is not supported: .*relative position bias'):
        MixEncoder.from_backbone(tmp_path)


def test_a_model_without_a_ranking_head_says_so(backbone_path):
    model = MixEncoder.from_backbone(backbone_path, num_labels=2)
    assert model.predict([("a", "the cat")]).shape == (1, 2)
    with pytest.raises(InputError, match="no head 'ranking'"):
        model.rank("a", DOCUMENTS)


def test_nothing_returns_nan(backbone_path):
    model = MixEncoder.from_backbone(backbone_path)
    with torch.no_grad():
        model.model.gate.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="4 of 4 scores are not finite"):
        model.rank("a", DOCUMENTS)


def test_the_published_setting_is_the_default(backbone_path):
    model = MixEncoder.from_backbone(backbone_path)
    assert not model.config.dual_term
    assert model.config.interaction_layers == [-1]
    assert isinstance(model.config.backbone_config, BertConfig)
    with pytest.raises(InputError, match="no dual term"):
        model.rank("a", DOCUMENTS, score="dual")
