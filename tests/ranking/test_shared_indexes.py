"""One index serves every model with its encoder: what is read, what may be written, and copies with new projections."""

import copy
import hashlib
import itertools
import json
import sqlite3

import pytest
import torch
from typer.testing import CliRunner

from mixencoder import IndexDamagedError, IndexMismatchError, IndexStateError, InputError, MixEncoder
from mixencoder.base.weights_version import weights_version
from mixencoder.cli import app
from mixencoder.index import CandidateIndex, Snapshot
from mixencoder.index import copying as index_copying
from mixencoder.ranking import identity as identity_file
from mixencoder.ranking import index_encoder
from tests.conftest import WORDS

TEXTS = [f"{a} {b} in the pot" for a, b in itertools.product(WORDS[4:9], WORDS[9:13])]
QUERIES = ["how to cook rice", "undo commit"]
FORMS = {
    "published": {},
    "dual": {"num_context_embeddings": 2, "dual_term": True},
    "deep": {"num_context_embeddings": 3, "interaction_layers": (0, -1)},
    "no-state": {"num_context_embeddings": 2, "state_row": False},
    "no-update": {"num_context_embeddings": 2, "context_update": False, "dual_term": True},
}


def made(backbone_path, form="dual"):
    torch.manual_seed(0)
    return MixEncoder.from_backbone(backbone_path, **FORMS[form])


def trained(engine, chosen=("interaction", "gate")):
    """Return a copy whose weights of these names are others; by default all of the interaction."""
    other = copy.deepcopy(engine)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in other.model.named_parameters():
            if name.startswith(chosen):
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return other


@pytest.fixture
def first(backbone_path):
    return made(backbone_path)


@pytest.fixture
def second(first):
    return trained(first)


@pytest.fixture
def old_parts(monkeypatch):
    """Make indexes whose fingerprint has one hash of all weights, as they were made before."""
    monkeypatch.setattr(index_encoder, "part_names", lambda layout: ("weights", "tokenizer", "dtype"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def fields_of(index):
    view = index.snapshot()
    return view.gather(range(len(view)))


def assert_same_rows(index, other):
    found, expected = fields_of(index), fields_of(other)
    assert found.positions.tolist() == expected.positions.tolist()
    assert found.fields.keys() == expected.fields.keys()
    for name, rows in found.fields.items():
        assert rows.equal(expected.fields[name]), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_a_projected_index_serves_another_interaction_as_a_compact_one_does(backbone_path, form, precision, tmp_path):
    first = made(backbone_path, form)
    second = trained(first)
    index = first.index(TEXTS, precision=precision, path=tmp_path / "index")
    expected = second.rank(QUERIES, second.index(TEXTS, precision=precision, layout="compact"))
    found = second.rank(QUERIES, second.open_index(tmp_path / "index"))
    if form == "no-update" and precision != "float32":
        # the mean of the embeddings is stored, rounded, in place of the rounded embeddings
        exact, rounded = ([entry["score"] for hits in lists for entry in hits] for lists in (expected, found))
        assert rounded == pytest.approx(exact, rel=0.03, abs=0.03)
    else:
        assert found == expected
    # and its maker's rankings read the projections, as ever
    assert first.rank(QUERIES, index) == first.rank(QUERIES, first.index(TEXTS, precision=precision))
    assert second.rank(QUERIES, index) == found


def test_options_of_ranking_hold_over_an_index_of_another_interaction(first, second):
    index, compact = first.index(TEXTS), second.index(TEXTS, layout="compact")
    some = [entry["id"] for entry in first.rank(QUERIES[0], index, top_k=5)]
    for options in ({"ids": some}, {"prefilter": 4}, {"products": "int8"}, {"score": "dual"}, {"top_k": 3}):
        assert second.rank(QUERIES, index, **options) == second.rank(QUERIES, compact, **options)
    assert second.rank(QUERIES, index.snapshot().to("cpu")) == second.rank(QUERIES, compact)
    assert isinstance(index.snapshot(), Snapshot)


def test_the_mean_alone_does_not_serve_a_model_that_updates_contexts(backbone_path, tmp_path):
    mean, full = made(backbone_path, "no-update"), made(backbone_path, "dual")
    full.model.codes = mean.model.codes
    mean.index(TEXTS, path=tmp_path / "index")
    for use in (lambda: full.open_index(tmp_path / "index"), lambda: full.rank("x", mean.index(TEXTS))):
        with pytest.raises(IndexMismatchError, match=r"only the mean of the context.*Use the one that made it, or"):
            use()
    # but a model without the update reads the embeddings of one with it
    expected = mean.rank(QUERIES, mean.index(TEXTS, layout="compact"))
    assert mean.rank(QUERIES, full.index(TEXTS)) == expected


@pytest.mark.parametrize("form", ["dual", "no-update"])
def test_rows_of_another_interaction_are_not_added(backbone_path, form, tmp_path):
    first = made(backbone_path, form)
    second, folder = trained(first), tmp_path / "index"
    first.index(TEXTS, [str(number) for number in range(len(TEXTS))], folder).close()
    before = contents(folder)
    index = second.open_index(folder)
    advice = "project_index" if form == "dual" else "build it again"
    message = rf"holds projections by .*projection is \w+, expected \w+\. It can be ranked, but not added.*{advice}"
    for write in (
        lambda: index.add(["paris"], ["new"]),
        lambda: index.add(ids=["new"], embeddings=second.encode_document(["paris"])),
        lambda: index.update(["paris"], ["1"]),
        index.repair,
    ):
        with pytest.raises(IndexMismatchError, match=message):
            write()
    assert contents(folder) == before
    # what needs no model goes on
    assert index.remove(["3", "5"]) == 2
    assert index.compact() > 0
    kept = [text for number, text in enumerate(TEXTS) if number not in (3, 5)]
    assert [entry.text for entry in index.entries()] == kept
    assert first.rank(QUERIES, first.open_index(folder), 3) == first.rank(QUERIES, index, 3)
    assert first.open_index(folder).add(["paris"], ["new"]).added == 1


def test_models_with_one_encoder_add_to_one_compact_index(first, second, tmp_path):
    index = first.index(TEXTS[:8], path=tmp_path / "index", layout="compact")
    assert second.open_index(tmp_path / "index").add(TEXTS[8:]).added == len(TEXTS) - 8
    assert_same_rows(index, first.index(TEXTS, layout="compact"))
    assert first.rank(QUERIES, index) == first.rank(QUERIES, first.index(TEXTS, layout="compact"))


def test_a_model_that_is_trained_does_not_add_to_its_open_index(first):
    index = first.index(TEXTS[:3])
    with torch.no_grad():
        first.model.interaction[0].key.bias.add_(1)
    with pytest.raises(IndexMismatchError, match="can be ranked, but not added to"):
        index.add(["paris"])
    assert len(first.rank("x", index)) == 3
    with torch.no_grad():
        first.model.codes.add_(1)
    with pytest.raises(IndexMismatchError, match="encoder is"):
        index.add(["paris"])


@pytest.mark.parametrize(
    ("chosen", "parts"),
    [
        (("interaction.0.key", "gate.bias"), {"projection"}),
        (("interaction.0.state_query",), {"projection"}),
        (("interaction.0.output", "interaction.1", "dual_scale"), set()),
        (("codes",), {"encoder"}),
        (("backbone",), {"encoder"}),
    ],
)
def test_parts_of_a_fingerprint_cover_what_they_say(backbone_path, chosen, parts):
    torch.manual_seed(0)
    first = MixEncoder.from_backbone(backbone_path, 2, (0, -1), dual_term=True)
    found, changed = (engine.index(["x"]).fingerprint for engine in (first, trained(first, chosen)))
    assert list(found) == ["name", "encoder", "tokenizer", "dtype", "projection", "document tokens"]
    assert {name for name in found if found[name] != changed[name]} == parts
    compact = first.index(["x"], layout="compact").fingerprint
    assert compact == {name: value for name, value in found.items() if name != "projection"}
    with torch.no_grad():
        # a projected row depends on the hint's part of the gate alone
        first.model.gate.weight[:, first.model.config.hidden_size :] += 1
    assert first.index(["x"]).fingerprint == found
    with torch.no_grad():
        first.model.gate.weight[:, 0] += 1
    assert first.index(["x"]).fingerprint != found


def test_ranking_hashes_and_prepares_weights_once_for_a_model(first, second, monkeypatch):
    index, compact = first.index(TEXTS), second.index(TEXTS, layout="compact")
    second.rank("x", index)
    prepared = second._index_ranker._rankers.get(weights_version(second.model), dict)
    monkeypatch.setattr(identity_file, "_hash", None)
    # both are read as embeddings, by one ranker
    assert second.rank("x", index) == second.rank("x", compact)
    assert len(prepared) == 1
    monkeypatch.undo()
    second.rank("x", second.index(TEXTS))
    assert len(prepared) == 2


@pytest.mark.parametrize("form", ["published", "dual", "no-state"])
@pytest.mark.parametrize("layout", ["projected", "compact"])
def test_a_copy_with_new_projections_is_the_index_that_encoding_would_make(backbone_path, form, layout, tmp_path):
    first = made(backbone_path, form).with_limits(max_document_length=6)
    second = trained(first)
    long = "cook the rice in a pot of water and boil it"
    options = {"ids": [f"id{number}" for number in range(6)], "precision": "float32", "on_overflow": "chunk"}
    options["metadata"] = [{"n": 1.5, "a": ["ä"]}, None, None, {}, None, None]
    texts = [TEXTS[0], long, *TEXTS[1:4], long + long]
    source, fresh = first.index(texts, **options), second.index(texts, layout=layout, **options)
    for index in (source, fresh):
        index.remove(["id3"])
    copied = second.project_index(source, tmp_path / "copy", layout=layout)
    assert copied.fingerprint == fresh.fingerprint
    assert copied.settings == fresh.settings
    assert list(copied.entries()) == list(fresh.entries())
    assert copied.snapshot().rows > len(copied)
    assert_same_rows(copied, fresh)
    assert second.rank(QUERIES, copied) == second.rank(QUERIES, fresh)
    assert second.open_index(tmp_path / "copy").add(["paris"], ["new"]).added == 1
    assert copied.verify().ok


def test_a_copy_in_int8_keeps_the_stored_numbers(first, second, tmp_path):
    source = first.index(TEXTS, precision="int8")
    for layout in ("projected", "compact"):
        copied = second.project_index(source, layout=layout)
        for name in ("context", "context_scale"):
            assert fields_of(copied).fields[name].equal(fields_of(source).fields[name])
    assert second.rank(QUERIES, copied) == second.rank(QUERIES, source)
    wider = second.project_index(source, precision="float32", layout="compact")
    assert second.rank(QUERIES, wider) == second.rank(QUERIES, source)


def test_a_copy_keeps_what_its_source_lacks(first, second):
    embeddings = first.encode_document(TEXTS[:3])
    source = first.index(embeddings=embeddings, store_text=False)
    copied = second.project_index(source)
    assert list(copied) == list(source)
    assert not copied.store_text
    assert [entry.text for entry in copied.entries()] == [None] * 3
    # ids are hashes of the content: what is there is not added again
    assert copied.add(embeddings=embeddings).skipped == 3
    assert len(second.project_index(first.index([]))) == 0


def test_a_copy_that_was_interrupted_goes_on_with_the_same_call(first, second, tmp_path, monkeypatch):
    source = first.index(TEXTS, path=tmp_path / "source", precision="float32")
    monkeypatch.setattr(index_copying, "COMMIT_DOCUMENTS", 4)
    converted, calls = index_encoder.IndexAdapter.converted, []

    def interrupted(adapter, *arguments):
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return converted(adapter, *arguments)

    monkeypatch.setattr(index_encoder.IndexAdapter, "converted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        second.project_index(source, tmp_path / "copy")
    with pytest.raises(IndexStateError, match=r"unfinished.*after 8 documents"):
        second.open_index(tmp_path / "copy")
    with pytest.raises(IndexStateError, match="holds other documents than the first"):
        second.project_index(first.index(TEXTS[1:], precision="float32"), tmp_path / "copy")
    with pytest.raises(IndexMismatchError, match=r"holds projections by .*finish it with the model that began it"):
        first.project_index(source, tmp_path / "copy")
    copied = second.project_index(source, tmp_path / "copy")
    # three before the interruption, and the rest of 20 documents, 4 at a time
    assert len(calls) == 3 + 3
    assert_same_rows(copied, second.index(TEXTS, precision="float32"))
    with pytest.raises(IndexStateError, match="holds a complete index of 20 documents"):
        second.project_index(source, tmp_path / "copy")


def test_no_copy_is_made_of_what_does_not_serve(backbone_path, first, second, tmp_path):
    source = first.index(TEXTS, path=tmp_path / "source")
    with pytest.raises(IndexMismatchError, match="encoder is"):
        trained(first, ("codes",)).project_index(source, tmp_path / "copy")
    with pytest.raises(IndexMismatchError, match="document tokens is 40, expected 6"):
        second.with_limits(max_document_length=6).project_index(source, tmp_path / "copy")
    with pytest.raises(InputError, match="layout is 'wide'"):
        second.project_index(source, tmp_path / "copy", layout="wide")
    with pytest.raises(InputError, match="index is a PosixPath; expected an index"):
        second.project_index(tmp_path / "source")
    mean = made(backbone_path, "no-update")
    with pytest.raises(IndexMismatchError, match=r"only the mean of the context embeddings.*from the texts"):
        trained(mean).project_index(mean.index(TEXTS), tmp_path / "copy")
    shard = next((tmp_path / "source").glob("generation-*/shard-*.context.bin"))
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    with pytest.raises(IndexDamagedError, match="nothing was copied"):
        second.project_index(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_an_unfinished_index_is_finished_by_the_interaction_that_began_it(first, second, tmp_path):
    def broken():
        yield from [f"{a} {b} {c}" for a, b, c in itertools.product(WORDS, WORDS, WORDS[:4])][:1500]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.index(broken(), path=tmp_path / "index")
    before = contents(tmp_path / "index")
    with pytest.raises(IndexMismatchError, match=r"holds projections by .*finish it with the model that began it"):
        second.index(TEXTS, path=tmp_path / "index")
    assert contents(tmp_path / "index") == before
    assert len(first.index(TEXTS, path=tmp_path / "index")) > len(TEXTS)


def test_older_indexes_stay_with_the_model_that_made_them(first, second, old_parts, monkeypatch, tmp_path):
    folder = tmp_path / "index"
    index = first.index(TEXTS, path=folder, precision="float32")
    weights = hashlib.sha256()
    for name, tensor in sorted(first.model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.numpy().tobytes())
    made_with = index.fingerprint
    assert list(made_with) == ["name", "weights", "tokenizer", "dtype", "document tokens"]
    assert made_with["weights"] == weights.hexdigest()[:16]
    monkeypatch.undo()
    expected = first.rank(QUERIES, first.index(TEXTS, precision="float32"))
    opened = first.open_index(folder)
    assert first.rank(QUERIES, opened) == expected
    for use in (lambda: second.open_index(folder), lambda: second.rank("x", index)):
        with pytest.raises(IndexMismatchError, match=r"weights is \w+, expected \w+\. Use the one .*build it again"):
            use()
    assert opened.add(["paris"]).added == 1
    assert opened.update(["water"], [next(iter(opened))]).replaced == 1
    assert opened.fingerprint == made_with
    copied = first.project_index(opened, tmp_path / "copy")
    assert copied.fingerprint == first.index(["x"]).fingerprint
    assert first.rank(QUERIES, copied) == first.rank(QUERIES, opened)
    assert len(second.rank(QUERIES[0], copied)) == len(copied)


def test_an_older_unfinished_index_is_finished(first, second, old_parts, monkeypatch, tmp_path):
    first.index(TEXTS[:3], path=tmp_path / "index").close()
    (catalogue,) = (tmp_path / "index").glob("generation-*/catalogue.sqlite")
    connection = sqlite3.connect(catalogue)
    connection.execute("UPDATE manifest SET value = 'false' WHERE name = 'complete'")
    connection.commit()
    connection.close()
    monkeypatch.undo()
    with pytest.raises(IndexMismatchError, match="weights is"):
        second.index(TEXTS, path=tmp_path / "index")
    index = first.index(TEXTS, path=tmp_path / "index")
    assert (len(index), "weights" in index.fingerprint) == (len(TEXTS), True)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_copies_an_index_for_a_model(first, second, tmp_path):
    first.index(TEXTS, path=tmp_path / "source").close()
    second.save_pretrained(tmp_path / "second")
    where = ["--model", tmp_path / "second"]
    added = run("index", "add", tmp_path / "source", "--candidates", tmp_path / "no.txt", *where)
    assert added.exit_code == 2
    made = run("index", "project", tmp_path / "source", tmp_path / "copy", "--precision", "int8", *where)
    assert (made.exit_code, "copy holds 20 candidates" in made.output) == (0, True), made.output
    info = json.loads(run("index", "info", tmp_path / "copy", "--json").stdout)
    assert info["settings"] == {"precision": "int8", "layout": "projected", "on_overflow": "truncate"}
    assert info["fingerprint"]["projection"] != CandidateIndex.open(tmp_path / "source", None).fingerprint["projection"]
    ranked = run("rank", QUERIES[0], "--index", tmp_path / "source", "--json", *where)
    assert len(json.loads(ranked.stdout)) == len(TEXTS)
    again = run("index", "project", tmp_path / "source", tmp_path / "copy", *where)
    assert (again.exit_code, "holds a complete index" in again.output) == (2, True)
