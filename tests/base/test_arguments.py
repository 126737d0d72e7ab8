"""Arguments of engines: what counts as texts, pairs and numbers, what is refused, and what results hold."""

import json
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

import mixencoder
from mixencoder import CandidateIndex, InputError, MixEncoder, NonFiniteError, RankResult
from mixencoder.base import inputs
from tests.base.engine_cases import untrained

DOCUMENTS = ["cook the rice in a pot", "undo the git commit", "paris is the capital of france", "the cat sat"]
QUERY = "how to cook rice"


@pytest.fixture(scope="module")
def model(backbone_path):
    return untrained("mixencoder", backbone_path, dual_term=True)


@pytest.fixture(scope="module")
def index(model):
    return model.index(DOCUMENTS, ["a", "b", "c", "d"], precision="float32")


class Series:
    """Like a column of pandas or polars: an iterable of one dimension, neither sequence nor array."""

    ndim = 1
    shape = (4,)

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)


class Table(Series):
    """Like a pandas DataFrame: iterating gives names of columns."""

    ndim = 2
    columns = ("query", "document")


@pytest.mark.parametrize(
    "form",
    [
        tuple,
        iter,
        np.array,
        lambda texts: np.array(texts, dtype=object),
        lambda texts: dict(enumerate(texts)).values(),
        lambda texts: dict.fromkeys(texts).keys(),
        lambda texts: (text for text in texts),
        Series,
    ],
)
def test_texts_may_come_in_any_ordered_iterable(engine, form):
    expected = engine.rank(QUERY, DOCUMENTS, ids=list("abcd"))
    assert engine.rank(QUERY, form(DOCUMENTS), ids=form(list("abcd"))) == expected
    assert engine.rank(form([QUERY]), DOCUMENTS, ids=list("abcd")) == [expected]


def test_pairs_may_come_in_any_ordered_iterable(engine):
    pairs = [(QUERY, text) for text in DOCUMENTS]
    expected = engine.predict(pairs).tolist()
    forms = [zip([QUERY] * 4, DOCUMENTS, strict=True), np.array(pairs), map(list, pairs), Series(pairs), iter(pairs)]
    for form in forms:
        assert engine.predict(form).tolist() == expected
    assert engine.predict(np.array(pairs[1])) == engine.predict(pairs[1]) == pytest.approx(expected[1], abs=1e-5)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ("ab", "pairs is a str; expected"),
        ({"a": "b"}, "pairs is a dict; expected"),
        ({("a", "b")}, "pairs is a set; expected"),
        (Table(["query", "document"]), "pairs is a Table; expected"),
        (3, "pairs is a int; expected"),
        (np.array("a"), "pairs is a ndarray; expected"),
        ([("a", "b"), {"a", "b"}], "pair 1 is .*; expected"),
        ([("a", "b"), "ab"], "pair 1 is 'ab'; expected"),
        ([("a", "b"), ("a",)], "pair 1 is .*; expected"),
    ],
)
def test_invalid_pairs_are_refused(engine, pairs, words):
    with pytest.raises(InputError, match=words):
        engine.predict(pairs)


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ("the cat", r"documents is a string, 'the cat'; expected a list of strings, \[text\] for a single one"),
        ("the cat " * 1000, r"documents is a string, 'the cat .*\.\.\.'; expected a list"),
        ("\0", "documents is a string"),
        (Path("nowhere"), "documents is a PosixPath, .*; expected a list of strings"),
        (b"abc", "documents is a bytes; expected"),
        ({"a": 1}, r"documents is a dict; expected .*keys or its values"),
        ({"a"}, "documents is a set; expected .*no order"),
        (frozenset("a"), "documents is a frozenset; expected .*no order"),
        (np.array([["a", "b"]]), "documents is a ndarray of 2 dimensions"),
        (Table(["query"]), "documents is a Table of 2 dimensions; .*one column"),
        (np.array("a"), "documents is a ndarray of 0 dimensions"),
        (7, "documents is a int; expected"),
        (None, "documents is a NoneType; expected"),
    ],
)
def test_invalid_documents_are_refused_by_rank_and_index(model, engine, documents, words):
    with pytest.raises(InputError, match=words):
        engine.rank("a", documents)
    calls = [model.estimate_index] + ([] if documents is None else [model.index])
    for call in calls:
        with pytest.raises(InputError, match=words):
            call(documents)


def test_the_path_of_an_index_is_refused_with_advice_to_open_it(model, engine, tmp_path):
    model.index(DOCUMENTS, path=tmp_path / "index").close()
    for path in (str(tmp_path / "index"), tmp_path / "index"):
        message = r"names the folder of an index; open it first: model\.open_index\("
        with pytest.raises(InputError, match=message):
            engine.rank("a", path)
        with pytest.raises(InputError, match=message):
            model.index(path)


def test_one_text_is_encoded_as_a_list_of_one(model):
    assert torch.equal(model.encode_document("the cat"), model.encode_document(["the cat"]))
    assert len(model.encode_query("the cat")) == 1


@pytest.mark.parametrize("number", [np.int64(2), np.uint8(2), torch.tensor(2)])
def test_integers_of_any_kind_are_taken(engine, number):
    expected = engine.rank(QUERY, DOCUMENTS, 2, batch_size=2)
    assert engine.rank(QUERY, DOCUMENTS, number, batch_size=number) == expected
    assert len(engine.predict([(QUERY, text) for text in DOCUMENTS], batch_size=number)) == 4


def test_an_index_takes_integers_of_any_kind_too(model, index):
    expected, number = model.rank(QUERY, index, 2, prefilter=2), np.int64(2)
    assert model.rank(QUERY, index, number, prefilter=number, batch_size=number) == expected
    assert len(model.index(DOCUMENTS, batch_size=number)) == 4
    assert model.encode_document(DOCUMENTS, batch_size=number).shape[0] == 4


@pytest.mark.parametrize("number", [0, -1, True, 2.0, "2", np.float64(2)])
def test_other_values_than_positive_integers_are_refused(engine, model, index, number):
    message = "is .*; expected a positive integer"
    for name in ("top_k", "batch_size"):
        with pytest.raises(InputError, match=f"{name} {message}"):
            engine.rank(QUERY, DOCUMENTS, **{name: number})
    for name in ("top_k", "batch_size", "prefilter"):
        with pytest.raises(InputError, match=f"{name} {message}"):
            model.rank(QUERY, index, **{name: number})
    with pytest.raises(InputError, match="batch_size is"):
        model.index(DOCUMENTS, batch_size=number)


@pytest.mark.parametrize("form", [np.asarray, lambda values: values.tolist(), lambda values: values.numpy()[..., ::1]])
def test_an_activation_may_return_any_numbers_of_the_same_shape(model, engine, index, form):
    for documents, ranker in ((DOCUMENTS, engine), (index, model)):
        plain = ranker.rank([QUERY, "git"], documents)
        doubled = ranker.rank([QUERY, "git"], documents, activation_fn=lambda scores: form(2 * scores))
        for before, after in zip(plain, doubled, strict=True):
            assert [entry["score"] for entry in after] == [2 * entry["score"] for entry in before]
    scores = engine.predict([(QUERY, text) for text in DOCUMENTS], activation_fn=form)
    assert scores.shape == (4,)


@pytest.mark.parametrize("wrong", [lambda scores: scores[:, :1], lambda scores: scores.sum(), lambda scores: "no"])
def test_an_activation_that_changes_the_shape_is_refused(model, engine, index, wrong):
    for documents, ranker in ((DOCUMENTS, engine), (index, model)):
        with pytest.raises(InputError, match="activation_fn returned"):
            ranker.rank([QUERY, "git"], documents, activation_fn=wrong)
    with pytest.raises(InputError, match=r"activation_fn returned the shape .* for 4 pairs"):
        engine.predict([(QUERY, text) for text in DOCUMENTS], activation_fn=torch.sum)


def test_softmax_turns_logits_into_probabilities_and_leaves_scores(model):
    pairs = [(QUERY, text) for text in DOCUMENTS]
    engine = model.with_head("classification", ["no", "maybe", "yes"])
    logits = engine.predict(pairs, head="classification", convert_to_tensor=True)
    found = engine.predict(pairs, head="classification", apply_softmax=True, convert_to_tensor=True)
    assert torch.equal(found, logits.softmax(dim=-1))
    assert np.array_equal(engine.predict(pairs, apply_softmax=True), engine.predict(pairs))
    one = engine.predict(pairs[0], head="classification", apply_softmax=True)
    assert one.shape == (3,)
    assert one.sum() == pytest.approx(1)


def test_the_cut_comes_before_the_activation_over_texts_and_over_an_index(model, index):
    def softmax(scores):
        return scores.softmax(dim=-1)

    texts, rows = (model.rank(QUERY, some, top_k=2, activation_fn=softmax) for some in (DOCUMENTS, index))
    for ranking in (texts, rows):
        assert sum(entry["score"] for entry in ranking) == pytest.approx(1)
    assert [entry["score"] for entry in texts] == pytest.approx([entry["score"] for entry in rows], rel=1e-4)
    # the order is that of the scores before the activation
    falling = model.rank(QUERY, DOCUMENTS, activation_fn=lambda scores: -scores)
    assert [hit["corpus_id"] for hit in falling] == [hit["corpus_id"] for hit in model.rank(QUERY, DOCUMENTS)]


def test_ids_must_be_strings(model, engine, index):
    for documents, ranker in ((DOCUMENTS, engine), (index, model)):
        for ids, words in (
            ([1, 2, 3, 4], r"id 0 is 1 \(int\); expected a string"),
            (["a", "b", "c", None], r"id 3 is None \(NoneType\); expected a string"),
            ("abcd", "ids is the string 'abcd'; expected a list of strings"),
            ({"a", "b", "c", "d"}, "ids is a set"),
        ):
            with pytest.raises(InputError, match=words):
                ranker.rank(QUERY, documents, ids=ids)
    with pytest.raises(InputError, match=r"id 1 is 2 \(int\)"):
        model.rank([QUERY, "git"], index, ids=[["a"], ["b", 2]])
    with pytest.raises(InputError, match=r"ids\[1\] is 'b', but others are lists"):
        model.rank([QUERY, "git"], index, ids=[["a"], "b"])
    assert model.rank(QUERY, index, ids=[]) == []
    assert model.rank(QUERY, index, ids=np.array(["a", "b"])) == model.rank(QUERY, index, ids=["a", "b"])
    assert model.rank([QUERY, "git"], index, ids=[("a",), iter(["b"])]) == model.rank(
        [QUERY, "git"], index, ids=[["a"], ["b"]]
    )


def test_texts_that_were_not_kept_cannot_be_returned(model):
    encoded = model.encode_document(DOCUMENTS)
    for documents in (
        encoded,
        model.index(DOCUMENTS, store_text=False),
        model.index(DOCUMENTS, store_text=False).snapshot(),
        model.index(embeddings=encoded),
    ):
        with pytest.raises(InputError, match="return_documents needs texts, but"):
            model.rank(QUERY, documents, return_documents=True)


def test_results_hold_what_their_type_says(model, index):
    allowed = typing.get_type_hints(RankResult)
    assert RankResult.__required_keys__ == {"corpus_id", "score"}
    options = {"return_documents": True, "ids": ["a", "b", "c", "d"]}
    for entry in (*model.rank(QUERY, DOCUMENTS, **options), *model.rank(QUERY, index, **options)):
        assert set(entry) == {"corpus_id", "score", "id", "text"} < set(allowed)
        assert {name: type(value) for name, value in entry.items()} == {name: allowed[name] for name in entry}
        assert json.loads(json.dumps(entry)) == entry


def test_a_bar_counts_the_rows_of_an_index(model, index, capsys):
    plain = model.rank(QUERY, index, prefilter=2)
    assert capsys.readouterr().err == ""
    assert model.rank(QUERY, index, prefilter=2, show_progress_bar=True) == plain
    assert "Candidates: 100%" in (shown := capsys.readouterr().err)
    assert "4/4" in shown
    model.rank(QUERY, index, ids=["a", "c"], show_progress_bar=True)
    assert "2/2" in capsys.readouterr().err


def test_weights_that_are_nan_raise_when_encoding(engine):
    weights = next(engine.model.backbone.parameters())
    before = weights.data.clone()
    weights.data.fill_(float("nan"))
    try:
        calls = [lambda: engine.rank(QUERY, DOCUMENTS), lambda: engine.predict([(QUERY, DOCUMENTS[0])])]
        if hasattr(engine, "encode_query"):
            calls += [lambda: engine.encode_query(QUERY), lambda: engine.encode_document(DOCUMENTS)]
        if hasattr(engine, "index"):
            calls += [lambda: engine.index(DOCUMENTS), lambda: engine.query_states([QUERY])]
        for call in calls:
            with pytest.raises(NonFiniteError, match="not finite"):
                call()
    finally:
        weights.data.copy_(before)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("half", torch.float16), ("fp32", torch.float32)],
)
def test_short_names_of_dtypes_are_understood(backbone_path, name, dtype):
    assert MixEncoder.from_backbone(backbone_path, dtype=name).dtype == dtype


def test_the_default_is_float32_on_a_cpu(backbone_path):
    plain, auto = (MixEncoder.from_backbone(backbone_path, device=device) for device in (None, "auto"))
    assert auto.device == plain.device
    assert plain.dtype == torch.float32


@pytest.mark.parametrize("faster", [True, False])
def test_auto_is_bfloat16_where_the_processor_multiplies_it_faster(backbone_path, monkeypatch, faster):
    monkeypatch.setattr(inputs, "multiplies_faster", lambda dtype, device: faster)
    want = torch.bfloat16 if faster else torch.float32
    assert MixEncoder.from_backbone(backbone_path, device="cpu", dtype="auto").dtype == want
    model = MixEncoder.from_backbone(backbone_path, device="cpu", dtype="float64")
    assert model.to(dtype="auto").dtype == want


def test_auto_is_bfloat16_on_a_gpu_that_multiplies_it(monkeypatch):
    monkeypatch.setattr(inputs, "multiplies_faster", inputs.multiplies_faster.__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert inputs.resolve_dtype("auto", torch.device("cuda")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert inputs.resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_a_model_is_cast_and_moved_in_place(backbone_path):
    torch.manual_seed(0)
    model = MixEncoder.from_backbone(backbone_path, dual_term=True)
    index = model.index(DOCUMENTS)
    model.rank(QUERY, index)
    assert model.to("bf16") is model
    assert model.to(torch.device("cpu"), torch.bfloat16).dtype == torch.bfloat16
    low = model.rank(QUERY, DOCUMENTS)
    assert model.rank(QUERY, model.index(DOCUMENTS, precision="bfloat16"))[0]["corpus_id"] == low[0]["corpus_id"]
    with pytest.raises(mixencoder.IndexMismatchError, match="dtype"):
        model.rank(QUERY, index)
    assert model.to("cpu", dtype="float32").dtype == torch.float32
    for wrong in (("cpu", "cpu"), (), ("warp",), ("bf16", torch.float16)):
        with pytest.raises(InputError, match="expected"):
            model.to(*wrong)


def test_repr_describes_the_engine(engine, model):
    shown = repr(engine)
    count = sum(parameter.numel() for parameter in engine.model.parameters())
    assert shown.startswith(f"{type(engine).__name__}(d=32, ")
    assert (f"{count:,} parameters" if count < 1e5 else f"{count / 1e6:.1f}M parameters") in shown
    assert f"device={engine.device}, dtype=float32" in shown
    assert "k=1, J=1 (layers 2), dual term" in repr(model)


def test_verify_is_passed_on(model, tmp_path, monkeypatch):
    model.index(DOCUMENTS, path=tmp_path / "index").close()
    asked, opened = [], CandidateIndex.open

    def spied(path, fingerprint=None, *, verify=False, **options):
        asked.append(verify)
        return opened(path, fingerprint, **options)

    monkeypatch.setattr(CandidateIndex, "open", spied)
    assert len(model.open_index(tmp_path / "index")) == 4
    assert not any(asked)
    model.open_index(tmp_path / "index", verify=True)
    assert asked.count(True) == 1


def test_public_names_are_bound_without_loading_the_model():
    code = (
        "import sys; from mixencoder import InputError, IndexDamagedError, TruncationWarning; "
        "assert 'transformers' not in sys.modules; from mixencoder import CandidateIndex, RankResult, Snapshot"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert issubclass(mixencoder.IndexDamagedError, mixencoder.MixEncoderError)
