"""The peers: each compared with plain code in loops, and the methods that they share with MixEncoder."""

import inspect
import subprocess
import sys
from functools import partial

import numpy as np
import peers_oracle as oracle
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from mixencoder import MixEncoder, MixEncoderModel
from mixencoder.base.encoder_passes import STEP
from mixencoder.base.tokenization import pad
from mixencoder.errors import CheckpointError, InputError, NonFiniteError, TruncationWarning, UnsupportedBackboneError
from mixencoder.peers import CrossEncoder, DeFormer, DualEncoder, LateInteraction, PolyEncoder
from mixencoder.peers.packed import PackedTokens
from tests.conftest import backbone_config

PEERS = [CrossEncoder, DualEncoder, PolyEncoder, LateInteraction, DeFormer]
AHEAD = [peer for peer in PEERS if peer is not CrossEncoder]
DOCUMENTS = ["cook the rice in a pot", "undo the git commit", "paris is the capital of france", "the cat sat"]
BOTH = {"heads": ("ranking", "classification"), "num_labels": 3}
QUERY_IDS = [[2, 5, 6, 7, 8, 3], [2, 9, 3], [2, 10, 11, 12, 3]]
DOCUMENT_IDS = [[2, 13, 14, 3], [2, 15, 16, 17, 18, 19, 3], [2, 20, 3], [2, 5, 9, 13, 3], [2, 9, 3], [2, 21, 22, 23, 3]]


def by_name(peer) -> str:
    return peer.__name__


@pytest.fixture(scope="module", params=PEERS, ids=by_name)
def model(request, backbone_path):
    torch.manual_seed(1)
    return request.param.from_backbone(backbone_path, **BOTH)


@pytest.fixture(scope="module", params=AHEAD, ids=by_name)
def ahead(request, backbone_path):
    torch.manual_seed(1)
    return request.param.from_backbone(backbone_path, **BOTH)


def build(peer, kind, **fields):
    """Return a tiny random model of a peer in float64, none of its weights at a neutral value."""
    torch.manual_seed(3)
    config = peer.model_class.config_class(backbone_config(kind, initializer_range=0.3), **BOTH, **fields)
    model = peer.model_class(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif not name.startswith("backbone."):
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def shape_of(model) -> oracle.Shape:
    config = model.config.backbone_config
    has_offset = "roberta" in config.model_type
    return oracle.Shape(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.layer_norm_eps,
        config.pad_token_id + 1 if has_offset else 0,
        config.type_vocab_size > 1,
    )


CASES = [
    *[
        (CrossEncoder, kind, {"separator": separator}, partial(oracle.cross_encoder, separator=separator))
        for kind, separator in (("bert", []), ("roberta", [3, 4]), ("electra", []))
    ],
    *[
        (
            DualEncoder,
            kind,
            fields,
            partial(oracle.dual_encoder, how=fields["pooling"], similarity=fields["similarity"]),
        )
        for kind, fields in (
            ("bert", {"pooling": "mean", "similarity": "cosine"}),
            ("xlm-roberta", {"pooling": "first", "similarity": "dot"}),
        )
    ],
    *[
        (PolyEncoder, kind, fields, partial(oracle.poly_encoder, how=fields["pooling"]))
        for kind, fields in (
            ("bert", {"pooling": "mean", "num_codes": 16}),
            ("roberta", {"pooling": "first", "num_codes": 64}),
        )
    ],
    *[
        (LateInteraction, kind, fields, partial(oracle.late_interaction, similarity=fields["similarity"]))
        for kind, fields in (
            ("bert", {"projection_dim": 12, "similarity": "cosine"}),
            ("roberta", {"projection_dim": None, "similarity": "dot"}),
        )
    ],
    *[
        (DeFormer, kind, {"joint_layers": joint}, partial(oracle.deformer, joint_layers=joint))
        for kind, joint in (("bert", 2), ("roberta", 3), ("xlm-roberta", 1), ("electra", 2))
    ],
]


@pytest.mark.parametrize(
    ("peer", "kind", "fields", "written"), CASES, ids=[f"{case[0].__name__}-{case[1]}" for case in CASES]
)
def test_padded_batches_equal_plain_code_with_loops(peer, kind, fields, written):
    model = build(peer, kind, **fields)
    weights, shape = dict(model.state_dict()), shape_of(model)
    inputs = (*pad(QUERY_IDS, 0), *pad(DOCUMENT_IDS, 0))
    with torch.no_grad():
        scores, logits = model(*inputs, head="ranking"), model(*inputs, head="classification")
        listed = model(*inputs, candidates_per_query=2, head="ranking")
        listed_logits = model(*inputs, candidates_per_query=2, head="classification")
    assert (scores.full.shape, logits.shape) == ((3, 6), (3, 6, 3))
    assert (listed.full.shape, listed_logits.shape) == ((3, 2), (3, 2, 3))
    for b, query in enumerate(QUERY_IDS):
        for n, document in enumerate(DOCUMENT_IDS):
            score, classes = written(weights, query, document, shape)
            torch.testing.assert_close(scores.full[b, n], score, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(logits[b, n], classes, rtol=1e-9, atol=1e-9)
            if n // 2 == b:
                torch.testing.assert_close(listed.full[b, n % 2], score, rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(listed_logits[b, n % 2], classes, rtol=1e-9, atol=1e-9)


def test_a_pair_that_is_too_long_loses_the_end_of_its_document():
    model = build(CrossEncoder, "roberta", separator=[3])
    query, document = [2, *range(5, 20), 3], [2, *range(5, 26), *range(5, 15), 3]
    inputs = (*pad([query, query[:4]], 0), *pad([document, document[:5]], 0))
    with torch.no_grad():
        got = model(*inputs, head="ranking").full
    for b, q in enumerate((query, query[:4])):
        for n, d in enumerate((document, document[:5])):
            want, _ = oracle.cross_encoder(dict(model.state_dict()), q, d, shape_of(model), [3])
            torch.testing.assert_close(got[b, n], want, rtol=1e-9, atol=1e-9)
    with pytest.raises(InputError, match="leaves no room for a document in 39 positions"):
        model(*pad([[2] * 38], 0), *pad([document], 0))


@pytest.mark.parametrize("peer", PEERS, ids=by_name)
def test_predict_and_rank_give_the_models_scores(peer, backbone_path):
    model = peer.from_backbone(backbone_path, dtype="float64", **BOTH)
    queries = ["how to cook rice", "the cat", "undo"]
    inputs = (*pad(model.read_query(queries), 0), *pad(model.read_document(DOCUMENTS), 0))
    pairs = [(query, document) for query in queries for document in DOCUMENTS]
    with torch.no_grad():
        scores, logits = model.model(*inputs, head="ranking").full, model.model(*inputs, head="classification")
    np.testing.assert_allclose(model.predict(pairs), scores.flatten(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(model.predict(pairs, head="classification"), logits.flatten(0, 1), rtol=1e-5, atol=1e-6)
    for row, ranking in enumerate(model.rank(queries, DOCUMENTS)):
        found = [scores[row, entry["corpus_id"]].item() for entry in ranking]
        assert found == sorted(found, reverse=True)
        np.testing.assert_allclose([entry["score"] for entry in ranking], found, rtol=1e-6, atol=1e-6)


def test_the_separator_is_read_off_the_tokenizer(backbone_path, tmp_path):
    from tokenizers import processors

    model = CrossEncoder.from_backbone(backbone_path)
    assert (model.config.separator, model.config.document_prefix, model.config.document_suffix) == ([], 1, 1)
    tokenizer = AutoTokenizer.from_pretrained(backbone_path)
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    model.model.backbone.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert CrossEncoder.from_backbone(tmp_path).config.separator == [3]
    query, document = "how to cook", "the cat sat"
    joined, mask, types = model.model.join(*pad(model.read_query([query]), 0), *pad(model.read_document([document]), 0))
    want = model.tokenizer(query, document, return_token_type_ids=True)
    assert joined[0].tolist() == want["input_ids"]
    assert types[0].tolist() == want["token_type_ids"]
    assert mask.all()


@pytest.mark.parametrize("kind", ["distilbert", "albert", "modernbert"])
@pytest.mark.parametrize("peer", PEERS, ids=by_name)
def test_other_backbones_serve_or_are_refused_with_the_reason(peer, kind):
    if peer is DeFormer:
        with pytest.raises(UnsupportedBackboneError, match=f'"{kind}": its layers .*Supported: bert'):
            build(peer, kind)
        return
    model = build(peer, kind)
    alone = [
        [model(*pad([query], 0), *pad([document], 0), head="ranking").full.item() for document in DOCUMENT_IDS]
        for query in QUERY_IDS
    ]
    together = model(*pad(QUERY_IDS, 0), *pad(DOCUMENT_IDS, 0), head="ranking").full
    torch.testing.assert_close(together, torch.tensor(alone, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_rank_returns_every_candidate_best_first(model):
    ranking = model.rank("how to undo a commit", DOCUMENTS, ids=list("abcd"), return_documents=True)
    assert sorted(entry["corpus_id"] for entry in ranking) == [0, 1, 2, 3]
    scores = [entry["score"] for entry in ranking]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 4
    for entry in ranking:
        assert entry["text"] == DOCUMENTS[entry["corpus_id"]]
        assert entry["id"] == "abcd"[entry["corpus_id"]]
    assert [set(entry) for entry in model.rank("boil", DOCUMENTS, top_k=2)] == [{"corpus_id", "score"}] * 2
    squashed = model.rank("boil", DOCUMENTS, activation_fn=torch.sigmoid)
    assert all(0 <= entry["score"] <= 1 for entry in squashed)


def test_ties_go_to_the_lower_corpus_id(model, words):
    chance = np.random.default_rng(0)
    others = [" ".join(chance.choice(words, chance.integers(1, 20))) for _ in range(70)]
    documents = ["the cat", "the rice", *others, "the cat", "the rice", "the cat"]
    forms = [documents] if isinstance(model, CrossEncoder) else [documents, model.encode_document(documents)]
    for form in forms:
        ranking = model.rank("the dog", form)
        for text in ([0, 72, 74], [1, 73]):
            places = [entry["corpus_id"] for entry in ranking if entry["corpus_id"] in text]
            assert places == text
            assert len({entry["score"] for entry in ranking if entry["corpus_id"] in text}) == 1


def test_several_queries_give_a_ranking_each(model):
    queries = ["boil water", "undo the commit", "boil water"]
    many = model.rank(queries, DOCUMENTS)
    assert many[0] == many[2]
    for query, ranking in zip(queries, many, strict=True):
        alone = model.rank(query, DOCUMENTS)
        assert [entry["corpus_id"] for entry in alone] == [entry["corpus_id"] for entry in ranking]
        want = [entry["score"] for entry in alone]
        np.testing.assert_allclose([entry["score"] for entry in ranking], want, rtol=1e-4, atol=1e-4)


def test_predict_forms(model):
    pairs = [("boil water", DOCUMENTS[0]), ("undo", DOCUMENTS[1]), ("boil water", DOCUMENTS[2])]
    scores = model.predict(pairs)
    assert (scores.shape, scores.dtype) == ((3,), np.float32)
    np.testing.assert_allclose(model.predict(pairs[1]), scores[1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.predict(pairs, batch_size=1), scores, rtol=1e-4, atol=1e-4)
    logits = model.predict(pairs, head="classification")
    assert (logits.shape, logits.dtype) == ((3, 3), np.float32)
    probabilities = model.predict(pairs, head="classification", activation_fn=lambda x: x.softmax(-1))
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    assert isinstance(model.predict(pairs, convert_to_tensor=True), torch.Tensor)
    assert isinstance(model.predict(pairs, convert_to_numpy=False), list)
    assert model.predict([]).shape == (0,)
    assert model.predict([], head="classification").shape == (0, 3)


def test_encoding_ahead_equals_scoring_texts(ahead, words):
    chance = np.random.default_rng(1)
    texts = [" ".join(chance.choice(words, chance.integers(1, 30))) for _ in range(150)]
    encoded = ahead.encode_document(texts, batch_size=7)
    assert len(encoded) == 150
    query = "how to cook rice"
    assert ahead.rank(query, encoded) == ahead.rank(query, texts, batch_size=7)
    scores = ahead.interact(ahead.encode_query([query, "git"]), encoded)
    assert (scores.shape, scores.dtype) == ((2, 150), torch.float32)
    np.testing.assert_allclose(ahead.predict([(query, text) for text in texts]), scores[0], rtol=1e-4, atol=1e-4)
    some = torch.tensor([149, 3, 3, 77])
    torch.testing.assert_close(ahead.interact(ahead.encode_query(["git"]), encoded[some])[0], scores[1, some])
    assert ahead.interact(ahead.encode_query([query]), ahead.encode_document([])).shape == (1, 0)


def test_only_the_cross_encoder_encodes_nothing_ahead():
    assert not hasattr(CrossEncoder, "encode_document")
    assert all(hasattr(peer, "encode_document") and hasattr(peer, "encode_query") for peer in AHEAD)


@pytest.mark.parametrize("blocks", [1, 50, 10**6])
@pytest.mark.parametrize("peer", [LateInteraction, DeFormer], ids=by_name)
def test_how_many_tokens_a_pass_holds_does_not_matter(peer, blocks, backbone_path, monkeypatch):
    torch.manual_seed(1)
    model = peer.from_backbone(backbone_path, dtype="float64", **BOTH)
    want = model.predict([("how to cook", text) for text in DOCUMENTS])
    monkeypatch.setattr(peer, "tokens_at_once", blocks)
    scores = model.interact(model.encode_query(["how to cook"]), model.encode_document(DOCUMENTS))
    np.testing.assert_allclose(scores[0], want, rtol=1e-6)
    np.testing.assert_allclose(model.predict([("how to cook", text) for text in DOCUMENTS]), want, rtol=1e-6)


def test_packed_tokens_share_the_vectors_of_equal_texts(backbone_path):
    model = LateInteraction.from_backbone(backbone_path, projection_dim=8)
    packed = model.encode_document(["the cat", "undo the commit", "the cat"])
    assert packed.vectors.shape == (4 + 5, 8)
    assert packed.lengths.tolist() == [4, 5, 4]
    assert packed.starts[0] == packed.starts[2] != packed.starts[1]
    states = packed.pad()
    assert states.vectors.shape == (3, 5, 8)
    assert states.mask.sum(1).tolist() == [4, 5, 4]
    assert torch.equal(states.vectors[0], states.vectors[2])


def test_saving_and_loading_keeps_every_bit(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    before, after = model.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.rank("boil water", DOCUMENTS) == model.rank("boil water", DOCUMENTS)
    pairs = [("boil", text) for text in DOCUMENTS]
    assert np.array_equal(again.predict(pairs, head="classification"), model.predict(pairs, head="classification"))
    assert not list((tmp_path / "saved").glob("*.bin"))
    assert type(AutoConfig.from_pretrained(tmp_path / "saved")) is type(model.config)
    assert type(AutoModel.from_pretrained(tmp_path / "saved")) is type(model.model)
    saved, loaded = (engine.config.to_dict() for engine in (model, again))
    assert {name for name in saved if saved[name] != loaded[name]} <= {"_name_or_path", "dtype"}


def test_a_checkpoint_of_another_kind_is_refused(model, tmp_path, backbone_path):
    name = type(model).__name__
    with pytest.raises(CheckpointError, match=f'type "bert"; expected "mixencoder-.*{name}.from_backbone'):
        type(model).from_pretrained(backbone_path)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match='holds a model of type "mixencoder-'):
        MixEncoder.from_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="is not a directory"):
        type(model).from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("head", ["ranking", "classification"])
@pytest.mark.parametrize("peer", PEERS, ids=by_name)
def test_every_weight_gets_a_gradient(peer, head):
    model = build(peer, "bert").train()
    model.backbone.eval()
    out = model(*pad(QUERY_IDS, 0), *pad(DOCUMENT_IDS, 0), candidates_per_query=2, head=head)
    out = out.full if head == "ranking" else out
    (out * torch.randn_like(out)).sum().backward()
    other = "classif" if head == "ranking" else "heads.ranking"
    for name, parameter in model.named_parameters():
        unused = other in name or (head == "classification" and name == "scale")
        assert unused or (parameter.grad is not None and parameter.grad.isfinite().all()), name
        # a key's bias moves all logits of a softmax alike, and one type of token is never seen
        flat = unused or name.endswith(("key.bias", "token_type_embeddings.weight"))
        assert flat or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("peer", PEERS, ids=by_name)
def test_training_raises_the_right_documents(peer, backbone_path):
    torch.manual_seed(0)
    model = peer.from_backbone(backbone_path)
    queries = ["cook rice", "undo git", "france", "dog"]
    inputs = (*pad(model.read_query(queries), 0), *pad(model.read_document(DOCUMENTS), 0))
    optimizer = torch.optim.Adam(model.model.parameters(), lr=3e-3)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model.model(*inputs).full, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [ranking[0]["corpus_id"] for ranking in model.rank(queries, DOCUMENTS)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.rank([], DOCUMENTS), "query is empty"),
        (lambda m: m.rank("a", []), "documents is empty"),
        (lambda m: m.rank("a", ["the cat", 3]), "document 1 is a int; expected a string"),
        (lambda m: m.rank(7, ["the cat"]), "query is a int; expected a string or a list"),
        (lambda m: m.rank("a", {"the cat"}), "documents is a set; expected a string or a list"),
        (lambda m: m.rank("a", ["the cat"], top_k=0), "top_k is 0; expected a positive integer"),
        (lambda m: m.rank("a", ["the cat"], ids=["x", "y"]), "ids names 2 documents but there are 1"),
        (lambda m: m.rank("a", ["the cat"], batch_size=0), "batch_size is 0"),
        (lambda m: m.rank("a", ["the cat"], score="dual"), "score is 'dual'; expected one of full"),
        (lambda m: m.rank("a", torch.zeros(3, 5, 32)), r"(candidates are|documents is) .*; expected"),
        (lambda m: m.predict([("a", "b", "c")]), "pair 0 is .*; expected"),
        (lambda m: m.predict([("a", "the cat"), (5, "the cat")]), "query 1 is a int"),
        (lambda m: m.predict([("a", "the cat")], batch_size=0), "batch_size is 0"),
        (lambda m: m.predict([("a", "the cat")], head="regression"), "no head 'regression'; its heads are ranking"),
        (lambda m: m.with_limits(max_document_length=41), "max_document_length is 41; expected 3 to 40"),
    ],
)
def test_bad_input_gets_a_clear_error(model, call, words):
    with pytest.raises(InputError, match=words):
        call(model)


def test_encoded_candidates_of_another_model_are_refused(ahead, backbone_path):
    query = ahead.encode_query("a")
    for wrong in (torch.zeros(3, 31), PackedTokens.from_texts([torch.zeros(4, 31)] * 2), [1, 2]):
        with pytest.raises(InputError, match=r"candidates are .*; expected .* as encode_document makes them"):
            ahead.interact(query, wrong)
    with pytest.raises(InputError, match="return_documents needs texts"):
        ahead.rank("a", ahead.encode_document(DOCUMENTS), return_documents=True)


@pytest.mark.parametrize(
    ("peer", "fields", "words"),
    [
        (DualEncoder, {"pooling": "max"}, "pooling is 'max'; expected one of mean, first"),
        (DualEncoder, {"similarity": "l2"}, "similarity is 'l2'; expected one of cosine, dot"),
        (PolyEncoder, {"num_codes": 0}, "num_codes is 0; expected an integer of at least 1"),
        (LateInteraction, {"projection_dim": 0}, "projection_dim is 0; expected an integer"),
        (DeFormer, {"joint_layers": 4}, "joint_layers is 4; expected an integer from 1 to 3"),
        (DeFormer, {"heads": "regression"}, "a head is 'regression'; expected one of ranking, classification"),
        (CrossEncoder, {"max_query_length": 2}, "max_query_length is 2; expected an integer of at least 3"),
        (CrossEncoder, {"num_labels": 0}, "num_labels is 0; expected an integer of at least 1"),
        (CrossEncoder, {"query_truncation_side": "up"}, "query_truncation_side is 'up'; expected one of left, right"),
        (CrossEncoder, {"classifier_dropout": 1.0}, "classifier_dropout is 1.0; expected a number from 0"),
        (CrossEncoder, {"device": "warp"}, "device 'warp' cannot be used here"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(peer, fields, words, backbone_path):
    with pytest.raises(InputError, match=words):
        peer.from_backbone(backbone_path, **fields)


def test_long_pairs_are_cut_and_counted_once(backbone_path):
    model = CrossEncoder.from_backbone(backbone_path)
    assert (model.read_query.max_length, model.read_document.max_length) == (20, 40)
    long = "rice " * 35
    with pytest.warns(TruncationWarning, match="1 of 2 pairs are longer than 40 tokens") as seen:
        cut = model.predict([("how to cook", long), ("how to cook", "the cat")])
    assert len(seen) == 1
    with pytest.warns(TruncationWarning):
        assert model.with_limits().predict(("how to cook", long + "dog")) == pytest.approx(cut[0], abs=1e-5)


@pytest.mark.parametrize("peer", PEERS, ids=by_name)
def test_texts_of_like_length_are_read_together_by_the_fused_attention(peer, backbone_path, words, monkeypatch):
    """A fair comparison needs fast peers: little padding, and the fused attention."""
    chance = np.random.default_rng(2)
    documents = [" ".join(chance.choice(words, length)) for length in chance.permutation(np.arange(1, 17)).repeat(8)]
    model = peer.from_backbone(backbone_path)
    read, padding, fused = [], [], []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def attend(*rows, **options):
        fused.append(1)
        return kernel(*rows, **options)

    def embed(module, positional, inputs):
        read.append(inputs["input_ids"].numel())
        padding.append(int((inputs["input_ids"] == 0).sum()))

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attend)
    model.model.backbone.embeddings.register_forward_pre_hook(embed, with_kwargs=True)
    model.rank("the cat", documents, batch_size=16)
    assert len(fused) >= len(read)
    # in the order given, a third would be padding; texts that are encoded alone are padded to multiples of STEP, and a
    # few are repeated to fill a pass
    lengths = [len(row) for row in model.read_document([*dict.fromkeys(documents), "the cat"])]
    assert sum(padding) <= max(0.05 * sum(read), 1.1 * sum(-length % STEP for length in lengths))


def test_a_single_head_is_the_default(model, backbone_path):
    classifier = type(model).from_backbone(backbone_path, num_labels=2)
    assert classifier.predict([("a", "the cat")]).shape == (1, 2)
    with pytest.raises(InputError, match="no head 'ranking'"):
        classifier.rank("a", DOCUMENTS)
    ranker = type(model).from_backbone(backbone_path)
    assert not any("classif" in name for name, _ in ranker.model.named_parameters())


def test_nothing_returns_nan(model, backbone_path):
    broken = type(model).from_backbone(backbone_path)
    with torch.no_grad():
        broken.model.backbone.encoder.layer[-1].output.dense.bias.fill_(float("nan"))
    for call in (lambda: broken.rank("a", DOCUMENTS), lambda: broken.predict([("a", text) for text in DOCUMENTS])):
        with pytest.raises(NonFiniteError, match=r"4 of 4 scores are|numbers of the encoded queries are not finite"):
            call()


def test_half_precision_scores_are_float32_and_close(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    low = type(model).from_pretrained(tmp_path / "saved", dtype="bfloat16")
    assert low.dtype == torch.bfloat16
    pairs = [("how to cook rice", text) for text in DOCUMENTS]
    scores = low.predict(pairs)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, model.predict(pairs), rtol=0.1, atol=0.5)


def test_the_six_share_their_signatures(model):
    for method in ("predict", "with_limits", "save_pretrained"):
        assert getattr(type(model), method) is getattr(MixEncoder, method)
    # MixEncoder has more parameters, for its index
    theirs, ours = (list(inspect.signature(cls.rank).parameters) for cls in (type(model), MixEncoder))
    assert set(ours) - set(theirs) == {"first_stage", "prefilter", "products"}
    assert set(theirs) <= set(ours)
    assert theirs[:4] == ours[:4]
    theirs, ours = (list(inspect.signature(cls.forward).parameters) for cls in (type(model.model), MixEncoderModel))
    # encodings, for an encoder that is not trained
    assert ours == [*theirs, "query_state", "document_contexts"]


def test_importing_the_names_is_quick():
    code = "import sys, mixencoder.peers as p; assert 'DualEncoder' in dir(p); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
