"""Odd texts in all six architectures: without tokens, invalid Unicode, too long; and the warnings about them."""

import itertools
import pickle
import warnings
from pathlib import Path

import pytest

from mixencoder import EmptyTextWarning, InputError, TruncationWarning
from mixencoder.architectures import ARCHITECTURES
from mixencoder.base.checkpoints.checkpoint import load_tokenizer
from mixencoder.base.notices import Notices
from mixencoder.base.tokenization import TextEncoder
from mixencoder.bundled import default_checkpoint
from mixencoder.peers import CrossEncoder
from tests.base.engine_cases import untrained

EMPTY = ["", "  ", "\n\t"]
LONG = "rice " * 60


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def every(request, backbone_path):
    return untrained(request.param, backbone_path)


@pytest.fixture(scope="module")
def model(backbone_path):
    return untrained("mixencoder", backbone_path, dual_term=True)


def warnings_of(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return seen


@pytest.mark.parametrize("empty", EMPTY)
def test_a_text_without_a_token_is_ranked_and_warned_of(every, empty):
    reader = every.with_limits()
    with pytest.warns(EmptyTextWarning, match="1 of 3 documents hold no token .* the first is document 1: ") as seen:
        ranking = reader.rank("the cat", ["the cat sat", empty, "rice"])
    assert sorted(entry["corpus_id"] for entry in ranking) == [0, 1, 2]
    assert len(seen) == 1
    with pytest.warns(EmptyTextWarning, match="1 of 1 queries hold no token"):
        assert len(reader.rank(empty, ["rice"])) == 1


def test_on_request_a_text_without_a_token_is_refused(engine):
    strict = engine.with_limits(on_empty="error")
    with pytest.raises(InputError, match="document 1 holds no token: ''; expected some text"):
        strict.rank("a", ["the cat", ""])
    with pytest.raises(InputError, match="query 0 holds no token: ' '"):
        strict.predict([(" ", "the cat")])
    assert strict.with_limits(max_query_length=5).read_query.on_empty == "error"
    with pytest.raises(InputError, match="on_empty is 'skip'; expected one of special, error"):
        engine.with_limits(on_empty="skip")


@pytest.mark.filterwarnings("ignore::mixencoder.errors.EmptyTextWarning")
def test_every_method_reads_a_text_without_a_token_in_the_same_way(model):
    reader = model.with_limits()
    expected = reader.rank("rice", ["the cat", "\n"])
    assert reader.rank("rice", reader.encode_document(["the cat", ""])) == expected
    indexes = [reader.index(["the cat", " "], on_overflow=way) for way in ("truncate", "chunk", "error")]
    index = reader.index(["the cat"])
    index.add(["\t"])
    for found in (*indexes, index):
        assert [entry["corpus_id"] for entry in reader.rank("rice", found)] == [hit["corpus_id"] for hit in expected]
    assert len(reader.rank("", index)) == 2
    assert len(reader.encode_query("")) == 1
    assert reader.notices == {"empty documents": 6, "empty queries": 2}
    with pytest.raises(InputError, match="document 0 holds no token"):
        model.with_limits(on_empty="error").index([" "])


def test_invisible_characters_are_no_tokens_of_the_bundled_model():
    read = TextEncoder(load_tokenizer(default_checkpoint()), 9)
    with pytest.warns(EmptyTextWarning, match=r"3 of 4 documents .* the first is document 0: '\\u200b'"):
        rows = read(["\u200b", "\u00ad\ufeff", "rice", ""])
    assert rows[0] == rows[1] == rows[3] != rows[2]


@pytest.mark.parametrize("text", ["a \ud83d b", "\udc00", "rice " * 50 + "\ud800"])
def test_half_of_a_surrogate_pair_is_named_before_any_pass(engine, text, monkeypatch):
    monkeypatch.setattr(engine.model, "forward", None)
    monkeypatch.setattr(engine.model.backbone, "forward", None)
    with pytest.raises(InputError, match=r"document 1 holds half of a surrogate pair .* not valid Unicode"):
        engine.rank("a", ["the cat", text])
    with pytest.raises(InputError, match="query 0 holds half of a surrogate pair"):
        engine.predict([(text, "the cat")])


def test_an_index_refuses_invalid_unicode(model):
    index = model.index(["the cat"])
    for call in (
        lambda: model.index(["a \ud83d"]),
        lambda: index.add(["a \ud83d"]),
        lambda: model.rank("\ud83d", index),
    ):
        with pytest.raises(InputError, match="not valid Unicode"):
            call()


def test_a_missing_value_is_named_as_such(engine):
    for value, found in ((None, "NoneType"), (float("nan"), "float"), (type("NAType", (), {})(), "NAType")):
        with pytest.raises(InputError, match=rf"document 1 is a {found} \(.*a missing value\); expected a string"):
            engine.rank("a", ["the cat", value])
    with pytest.raises(InputError, match=r"document 0 is a bytes; expected a string$"):
        engine.rank("a", [b"the cat"])


def test_a_kind_of_warning_is_given_once_and_counted_always(engine):
    reader = engine.with_limits()
    seen = warnings_of(lambda: [reader.rank("the cat", [LONG]) for _ in range(11)])
    said = [str(warning.message) for warning in seen if warning.category is TruncationWarning]
    kinds = [kind for kind in reader.notices if kind.startswith("truncated")]
    assert {reader.notices[kind] for kind in kinds} == {11}
    # warned at the first and at the tenth text
    assert len(said) == 2 * len(kinds)
    assert any("(10 truncated documents so far" in message for message in said)
    assert not any("so far" in message for message in said[: len(kinds)])
    # another engine starts counting at zero
    assert engine.with_limits().notices == {}
    assert len(warnings_of(lambda: engine.with_limits().rank("the cat", [LONG]))) == len(kinds)


def test_a_warning_points_at_the_callers_line(engine):
    calls = [lambda: engine.with_limits().rank("a", [LONG]), lambda: engine.with_limits().predict([("a", LONG)])]
    if hasattr(engine, "encode_document"):
        calls.append(lambda: engine.with_limits().encode_document([LONG]))
    for call in calls:
        for warning in warnings_of(call):
            assert Path(warning.filename) == Path(__file__)
            assert warning.lineno == call.__code__.co_firstlineno


def test_adding_to_an_index_warns_as_building_it_does(model, tmp_path):
    message = r'1 of 1 documents are longer than 40 tokens; their start was kept \(on_overflow="chunk" keeps all'
    index = model.with_limits().index(["paris"], ["a"], tmp_path / "index")
    calls = [
        lambda: model.with_limits().index([LONG]),
        lambda: index.add([LONG], ["b"]),
        lambda: model.with_limits().open_index(tmp_path / "index").update([LONG + "dog"], ["a"]),
    ]
    for call in calls:
        with pytest.warns(TruncationWarning, match=message) as seen:
            call()
        assert Path(seen[0].filename) == Path(__file__)


def test_an_estimate_warns_of_nothing(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.with_limits().estimate_index([LONG, ""])


def test_where_warnings_are_errors_every_call_raises(model):
    reader = model.with_limits()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(TruncationWarning):
                reader.encode_document([LONG])
        reader.rank("rice", ["the cat"])


def test_threads_count_every_text(tokenizer):
    from concurrent.futures import ThreadPoolExecutor

    read = TextEncoder(tokenizer, 5)
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("ignore")
        list(pool.map(lambda _: read(["the cat sat in a pot"] * 3), range(50)))
    assert read.notices.counts == {"truncated documents": 150}


def test_notices_warn_again_when_the_count_gains_a_digit():
    notices = Notices()
    said = [len(warnings_of(lambda: notices.note("things", 1, "one thing", UserWarning))) for _ in range(1000)]
    assert [number for number, count in enumerate(said, start=1) if count] == [1, 10, 100, 1000]
    assert pickle.loads(pickle.dumps(notices)).counts == {}


def test_a_long_empty_text_is_shown_in_short(tokenizer):
    with pytest.warns(EmptyTextWarning) as seen:
        TextEncoder(tokenizer, 9)([" " * 10000])
    assert len(str(seen[0].message)) < 200


def test_a_truncated_pair_gives_one_warning(backbone_path):
    model = CrossEncoder.from_backbone(backbone_path)
    pairs = list(itertools.repeat(("how to cook", "rice " * 35), 3))
    assert len(warnings_of(lambda: [model.predict(pairs) for _ in range(3)])) == 1
    assert model.notices == {"truncated pairs": 9}
