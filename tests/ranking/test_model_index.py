"""Indexes of a model: ranking through one equals ranking the texts, and no other model's rows are read."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mixencoder import MixEncoder
from mixencoder.cli import app
from mixencoder.errors import (
    DuplicateIdError,
    IndexMismatchError,
    IndexStateError,
    InputError,
    TruncationWarning,
    UnknownIdError,
)
from mixencoder.index import Snapshot
from mixencoder.ranking import index_ranker
from tests.conftest import WORDS

TEXTS = [f"{a} {b} {c}" for a, b, c in itertools.product(WORDS[4:9], WORDS[9:13], ("in the pot", "on"))]
QUERIES = ["how to cook rice", "undo commit", "paris"]
ALLOWED = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2, "int8": 3e-2}
"""Largest difference of a score, as a share of the scores' spread: a few units of the stored numbers' precision."""


@pytest.fixture(scope="module", params=[False, True], ids=["published", "dual"])
def model(request, backbone_path):
    torch.manual_seed(0)
    return MixEncoder.from_backbone(backbone_path, num_context_embeddings=2, dual_term=request.param)


@pytest.fixture(scope="module")
def dual(backbone_path):
    torch.manual_seed(0)
    return MixEncoder.from_backbone(backbone_path, dual_term=True)


def scores_of(ranking):
    return {entry["corpus_id"]: entry["score"] for entry in ranking}


@pytest.mark.parametrize("layout", ["projected", "compact"])
@pytest.mark.parametrize("precision", ALLOWED)
def test_an_index_ranks_as_the_texts_do(model, precision, layout):
    index = model.index(TEXTS, precision=precision, layout=layout)
    expected, found = model.rank(QUERIES, TEXTS), model.rank(QUERIES, index)
    for by_text, by_index in zip(expected, found, strict=True):
        values = np.array([scores_of(by_text)[place] for place in range(len(TEXTS))])
        stored = np.array([scores_of(by_index)[place] for place in range(len(TEXTS))])
        assert np.abs(values - stored).max() <= ALLOWED[precision] * max(np.ptp(values), np.abs(values).max())
        assert [entry["score"] for entry in by_index] == sorted(stored.tolist(), reverse=True)


def test_results_name_place_id_and_text(dual, tmp_path):
    index = dual.index(TEXTS[:5], [f"id{number}" for number in range(5)], tmp_path / "index")
    results = dual.rank(QUERIES[0], index, top_k=2, return_documents=True)
    assert len(results) == 2
    for entry in results:
        assert entry["text"] == TEXTS[entry["corpus_id"]]
        assert entry["id"] == f"id{entry['corpus_id']}"
    assert isinstance(dual.rank(QUERIES[:2], index)[1], list)
    doubled = dual.rank(QUERIES[0], index, activation_fn=lambda scores: 2 * scores)
    assert doubled[0]["score"] == 2 * results[0]["score"]


def test_a_first_stage_may_name_the_documents(dual):
    index = dual.index(TEXTS, [str(number) for number in range(len(TEXTS))])
    everything = scores_of(dual.rank(QUERIES[0], index))
    some = dual.rank(QUERIES[0], index, ids=["7", "3", "30"])
    assert scores_of(some) == {place: everything[place] for place in (3, 7, 30)}
    lists = dual.rank(QUERIES[:2], index, ids=[["7", "3"], ["1"]], top_k=1)
    assert [len(ranking) for ranking in lists] == [1, 1]
    assert lists[1][0]["id"] == "1"
    with pytest.raises(UnknownIdError, match="'no'"):
        dual.rank(QUERIES[0], index, ids=["no", "1"])
    with pytest.raises(DuplicateIdError, match="ids names '1' more than once"):
        dual.rank(QUERIES[0], index, ids=["1", "2", "1"])
    with pytest.raises(InputError, match="2 lists for 3 queries"):
        dual.rank(QUERIES, index, ids=[["1"], ["2"]])


def test_a_prefilter_interacts_with_the_best_by_dual_score_alone(dual):
    index = dual.index(TEXTS)
    by_dual = [entry["corpus_id"] for entry in dual.rank(QUERIES[0], index, top_k=6, score="dual")]
    full = scores_of(dual.rank(QUERIES[0], index))
    kept = dual.rank(QUERIES[0], index, prefilter=6)
    assert scores_of(kept) == {place: full[place] for place in by_dual}
    assert dual.rank(QUERIES[0], index, prefilter=len(TEXTS)) == dual.rank(QUERIES[0], index)
    with pytest.raises(InputError, match="prefilter and products are for an index"):
        dual.rank(QUERIES[0], TEXTS, prefilter=6)


def test_named_documents_are_read_some_at_a_time(dual, monkeypatch):
    index = dual.index(TEXTS, [str(number) for number in range(len(TEXTS))])
    ids = [str(number) for number in (7, 3, 30, 11, 2, 29, 5)]
    expected = [dual.rank(QUERIES[0], index, ids=ids, prefilter=kept) for kept in (None, 5)]
    sizes, gather = [], Snapshot.gather

    def spied(view, positions):
        sizes.append(len(positions))
        return gather(view, positions)

    monkeypatch.setattr(index_ranker, "CHUNK_ROWS", 3)
    monkeypatch.setattr(Snapshot, "gather", spied)
    assert [dual.rank(QUERIES[0], index, ids=ids, prefilter=kept) for kept in (None, 5)] == expected
    # and what a prefilter keeps of them is asked for by place
    assert sizes == [3, 3, 1, 3, 3, 1, 3, 2]


def test_a_prefilter_reads_all_candidates_once_for_all_queries(dual, monkeypatch):
    index = dual.index(TEXTS, [str(number) for number in range(len(TEXTS))])
    index.remove(["1", "4"])
    expected = [dual.rank(query, index, prefilter=6) for query in QUERIES]
    calls, chunks = [], Snapshot.chunks

    def spied(view, size):
        calls.append(size)
        return chunks(view, size)

    monkeypatch.setattr(Snapshot, "chunks", spied)
    assert dual.rank(QUERIES, index, prefilter=6) == expected
    assert len(calls) == 1


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "remove", "update", "compact", "reopen"]), st.integers(0, len(TEXTS) - 1)),
        max_size=8,
    ),
    queries=st.integers(1, 3),
)
def test_scores_do_not_notice_history_order_or_neighbours(dual, tmp_path_factory, steps, queries):
    """Bit for bit, for any sequence of changes."""
    path = tmp_path_factory.mktemp("history") / "index"
    index = dual.index(TEXTS[:3], ["a", "b", "c"], path)
    held = dict(zip("abc", TEXTS[:3], strict=True))
    for number, (step, pick) in enumerate(steps):
        if step == "add":
            index.add([TEXTS[pick]], [f"n{number}"])
            held[f"n{number}"] = TEXTS[pick]
        elif step == "compact":
            index.compact()
        elif step == "reopen":
            index.close()
            index = dual.open_index(path)
        elif len(held) > 1:
            name = list(held)[pick % len(held)]
            text = held.pop(name)
            if step == "remove":
                index.remove([name])
            else:
                index.update([TEXTS[pick]], [name])
                held[name] = TEXTS[pick]
            assert text is not None
    assert list(index) == list(held)
    found = dual.rank(QUERIES[:queries], index)
    fresh = dual.rank(QUERIES[:queries], dual.index(list(held.values()), list(held)))
    assert found == fresh
    alone = {name: dual.rank(QUERIES[0], dual.index([text], [name]))[0]["score"] for name, text in held.items()}
    assert {entry["id"]: entry["score"] for entry in found[0]} == alone


def test_long_documents_are_cut_split_or_refused(dual):
    reader = dual.with_limits(max_document_length=6)
    long = "cook the rice in a pot of water"  # 8 tokens, of which 4 fit
    with pytest.warns(TruncationWarning, match=r"1 of 2 documents are longer than 6 tokens.*on_overflow"):
        cut = reader.index([long, "paris"])
    assert cut.snapshot().rows == 2
    split = reader.index([long, "paris"], on_overflow="chunk")
    assert (len(split), split.snapshot().rows) == (2, 3)
    parts = {text: reader.rank("water", [text])[0]["score"] for text in ("cook the rice in", "a pot of water")}
    found = {entry["corpus_id"]: entry["score"] for entry in reader.rank("water", split)}
    assert found[0] == pytest.approx(max(parts.values()), rel=1e-3)
    with pytest.raises(InputError, match="document 0 has 8 tokens; expected at most 4"):
        reader.index([long], on_overflow="error")
    assert reader.index(["paris"]).add([long]).cut == 1


def test_a_query_is_read_within_the_limits_of_the_engine_that_ranks(dual):
    index = dual.index(TEXTS[:3])
    short = dual.with_limits(max_query_length=4)
    with pytest.warns(TruncationWarning, match="longer than 4 tokens"):
        cut = short.rank("the dog sat on", index)
    assert cut == dual.rank("the dog", index)
    assert cut != dual.rank("the dog sat on", index)


def test_an_index_of_another_checkpoint_or_setting_is_refused_and_named(dual, backbone_path, tmp_path):
    dual.index(TEXTS[:2], path=tmp_path / "index").close()
    torch.manual_seed(1)
    other = MixEncoder.from_backbone(backbone_path, num_context_embeddings=2, dual_term=True)
    with pytest.raises(IndexMismatchError, match=r"made by MixEncoder \(d=32, k=1\), but this is .*k=2.*encoder is"):
        other.open_index(tmp_path / "index")
    with pytest.raises(IndexMismatchError, match="document tokens is 40, expected 6"):
        dual.with_limits(max_document_length=6).open_index(tmp_path / "index")
    with pytest.raises(IndexStateError, match="holds a complete index"):
        dual.index(TEXTS, path=tmp_path / "index")
    with pytest.raises(InputError, match="on_overflow is 'cut'; expected one of truncate, chunk, error"):
        dual.index(TEXTS, on_overflow="cut")
    assert len(dual.open_index(tmp_path / "index")) == 2


def test_an_index_is_ranked_by_models_with_its_encoder_alone(backbone_path, tmp_path):
    names = []
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        # the codes are random, and so are the encoders different
        MixEncoder.from_backbone(backbone_path).save_pretrained(tmp_path / name)
        names.append(MixEncoder.from_pretrained(tmp_path / name))
    first, second = names
    index = first.index(TEXTS[:3])
    message = (
        r'made by MixEncoder "first" \(d=32, k=1\), but this is MixEncoder "second" .*encoder is \w+, expected \w+'
    )
    with pytest.raises(IndexMismatchError, match=message):
        second.rank(QUERIES[0], index)
    same = MixEncoder.from_pretrained(tmp_path / "first")
    assert same.rank(QUERIES[0], index) == first.rank(QUERIES[0], index)
    with torch.no_grad():
        first.model.codes.add_(1)
    with pytest.raises(IndexMismatchError, match="encoder"):
        first.rank(QUERIES[0], index)


def test_given_embeddings_serve_as_texts_do(dual):
    encoded = dual.encode_document(TEXTS)
    by_texts, by_embeddings = dual.index(TEXTS), dual.index(embeddings=encoded)
    places = [scores_of(dual.rank(QUERIES[0], index)) for index in (by_texts, by_embeddings)]
    assert places[0] == places[1]


def test_an_estimate_tells_the_bytes_that_the_arrays_will_have(dual, tmp_path):
    found = dual.estimate_index(TEXTS)
    assert found.array_bytes == dual.index(TEXTS, path=tmp_path / "index").info()["array_bytes"]
    assert found.documents == len(TEXTS)
    assert found.seconds > 0
    with pytest.raises(InputError, match="documents is empty"):
        dual.estimate_index([])


def test_an_estimate_counts_the_rows_of_documents_that_are_split(dual):
    reader, long = dual.with_limits(max_document_length=6), "cook the rice in a pot of water"
    found = reader.estimate_index([long, "paris"] * 50, on_overflow="chunk")
    assert found.array_bytes == 1.5 * reader.estimate_index(["paris"] * 100).array_bytes
    with pytest.raises(InputError, match="document 0 has 8 tokens"):
        reader.estimate_index([long], on_overflow="error")


def test_an_interrupted_building_goes_on_with_the_same_call(dual, tmp_path):
    texts = [f"{a} {b} {c}" for a, b, c in itertools.product(WORDS, WORDS, WORDS[:4])]

    def broken():
        yield from texts[:1500]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dual.index(broken(), path=tmp_path / "index", layout="compact")
    with pytest.raises(IndexStateError, match="1,024 documents"):
        dual.open_index(tmp_path / "index")
    with pytest.raises(IndexMismatchError, match="unfinished index with s"):
        dual.index(texts, path=tmp_path / "index", layout="projected")
    index = dual.index(texts, path=tmp_path / "index", layout="compact")
    assert [entry.text for entry in index.entries()] == texts
    assert dual.rank(QUERIES[0], index, 5) == dual.rank(QUERIES[0], dual.index(texts, layout="compact"), 5)


def test_a_repeated_query_is_encoded_once(dual, monkeypatch):
    index = dual.index(TEXTS[:3])
    first = dual.rank("the cat sat", index)
    monkeypatch.setattr(dual.model, "encode_query", None)
    assert dual.rank("the cat sat", index) == first


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_commands_build_change_and_rank_an_index(dual, tmp_path):
    dual.save_pretrained(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": t, "id": f"i{n}"}) for n, t in enumerate(TEXTS[:6]))
    )
    (tmp_path / "b.txt").write_text("\n".join(TEXTS[6:8]))
    index, where = tmp_path / "index", ["--model", tmp_path / "model"]
    dry = run("index", "build", index, "--candidates", tmp_path / "a.jsonl", "--dry-run", *where)
    assert dry.exit_code == 0, dry.output
    assert dry.output.startswith("6 candidates: ")
    assert not index.exists()
    built = run("index", "build", index, "--candidates", tmp_path / "a.jsonl", *where)
    assert built.exit_code == 0, built.output
    again = run("index", "build", index, "--candidates", tmp_path / "a.jsonl", *where)
    assert (again.exit_code, "holds a complete index of 6 documents" in again.output) == (2, True)
    assert "2 added" in run("index", "add", index, "--candidates", tmp_path / "b.txt", *where).output
    assert "1 removed; now 7" in run("index", "remove", index, "i2").output
    unknown = run("index", "remove", index, "i2")
    assert (unknown.exit_code, "no document has the id 'i2'" in unknown.output) == (2, True)
    assert "freed" in run("index", "compact", index).output
    assert json.loads(run("index", "info", index, "--json").output)["documents"] == 7
    assert "documents" in run("index", "info", index).output
    ranked = run("rank", QUERIES[0], "--index", index, "--json", "--top-k", 3, "--prefilter", 5, *where)
    assert ranked.exit_code == 0, ranked.output
    assert len(json.loads(ranked.stdout)) == 3
    assert run("index", "verify", index).exit_code == 0
    shard = next(index.glob("generation-*/shard-*.context.bin"))
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    damaged = run("index", "verify", index)
    assert (damaged.exit_code, "context" in damaged.output, "mixencoder index repair" in damaged.output) == (
        2,
        True,
        True,
    )
    repaired = run("index", "repair", index, *where)
    assert "7 encoded again, 0 lost" in repaired.output, repaired.output
    assert run("index", "verify", index).exit_code == 0
    run("index", "remove", index, *(f"i{number}" for number in (0, 1, 3, 4, 5)))
    held = json.loads(run("rank", "x", "--index", index, "--json", *where).stdout)
    run("index", "remove", index, *(entry["id"] for entry in held))
    empty = run("rank", "x", "--index", index, *where)
    assert (empty.exit_code, "holds no candidate" in empty.output) == (2, True)


def test_candidates_without_a_text_are_ranked_by_the_command_too(dual, tmp_path):
    dual.save_pretrained(tmp_path / "model")
    index = dual.index(TEXTS[:2], ["a", "b"], tmp_path / "index")
    index.add(ids=["c"], embeddings=dual.encode_document(TEXTS[2:3]))
    ranked = run("rank", QUERIES[0], "--index", tmp_path / "index", "--json", "--model", tmp_path / "model")
    assert ranked.exit_code == 0, ranked.output
    found = {entry["id"]: entry.get("text") for entry in json.loads(ranked.stdout)}
    assert found == {"a": TEXTS[0], "b": TEXTS[1], "c": None}


def test_a_build_tells_what_it_cuts_and_a_dry_run_what_it_splits(dual, tmp_path):
    dual.save_pretrained(tmp_path / "model")
    long = " ".join(WORDS * 3)
    (tmp_path / "a.txt").write_text(f"{long}\n{WORDS[3]}\n")
    command = ["index", "build", tmp_path / "index", "--candidates", tmp_path / "a.txt", "--model", tmp_path / "model"]
    whole, split = (run(*command, "--dry-run", *more).output for more in ([], ["--on-overflow", "chunk"]))
    sizes = [int(output.split(": ")[1].split(" bytes of arrays")[0]) for output in (whole, split)]
    # 66 tokens in rows of 38
    assert sizes[1] == 1.5 * sizes[0]
    assert "warning: 1 of 2 documents are longer than 40 tokens" in run(*command).output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rank", "x"], "expected either --candidates FILE or --index DIR"),
        (["rank", "x", "--index", "a", "--candidates", "b"], "expected either --candidates FILE or --index DIR"),
        (["rank", "x", "--candidates", "b", "--prefilter", "3"], "--prefilter is for an index"),
        (["index", "build", "a"], "no candidates were named"),
        (["index", "info", "nowhere"], "nowhere"),
    ],
)
def test_wrong_usage_is_told(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output
