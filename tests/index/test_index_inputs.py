"""Arguments of the index's methods and commands: what cannot be used is named in the error, what can is accepted."""

import json
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mixencoder.cli import app
from mixencoder.errors import DuplicateIdError, InputError, UnknownIdError
from mixencoder.index import AddResult, CandidateIndex, Encoded, Entry, Field, Schema
from tests.index.index_stub import build, create, reopen, rows_of

LONE = "half \ud83d"


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"x": [value]}
    return value


def endless():
    value = {}
    value["x"] = value
    return value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither documents nor embeddings"),
        ({"documents": [3]}, "document 0 is 3"),
        ({"documents": 3}, "documents is a int"),
        ({"documents": b"text"}, "documents is a bytes"),
        ({"documents": ["\ud800"]}, "document 0 holds half of a surrogate pair"),
        ({"documents": ["a", "b"], "ids": ["x"]}, "2 documents, 1 ids"),
        ({"documents": ["a"], "ids": [1]}, "id 0 is 1"),
        ({"documents": ["a"], "ids": [""]}, "id 0 is empty"),
        ({"documents": ["a"], "metadata": [3]}, "metadata 0 is 3"),
        ({"documents": ["a"], "metadata": [{"x": {1}}]}, "metadata 0 is not JSON"),
        ({"documents": ["a"], "metadata": [{"x": float("nan")}]}, "metadata 0 is not JSON"),
        ({"embeddings": torch.zeros(3)}, "embeddings are"),
        ({"documents": ["a"], "embeddings": torch.zeros(2, 1)}, "1 documents, 2 embeddings"),
        ({"documents": ["a"], "metadata": [{1: "a", "1": "b"}]}, "metadata 0 has the key 1 (int); expected strings"),
        ({"documents": ["a"], "metadata": [{"x": [{None: 1}]}]}, "metadata 0 has the key None"),
        ({"documents": ["a", "b"], "metadata": [None, {"x": [float("inf")]}]}, "metadata 1 is not JSON: it holds inf"),
        ({"documents": ["a"], "metadata": [{"x": LONE}]}, "metadata 0 holds a string that holds half of a surrogate"),
        ({"documents": ["a"], "metadata": [{LONE: 1}]}, "metadata 0 holds a string that holds half of a surrogate"),
        ({"documents": ["a"], "metadata": [nested(100_000)]}, "metadata 0 is nested more than 64 levels deep"),
        ({"documents": ["a"], "metadata": [endless()]}, "metadata 0 is nested more than 64 levels deep"),
        ({"documents": ["a"], "metadata": [{"x": np.float32(1)}]}, "metadata 0 is not JSON: it holds"),
        ({"documents": ["a"], "metadata": {"x": 1}}, "metadata is a dict"),
        ({"documents": ["a"], "metadata": "x"}, "metadata is a str"),
        ({"documents": ["a", "b", "c"], "ids": "abc"}, "ids is the string 'abc'; expected a list of strings"),
        ({"documents": ["a"], "ids": b"a"}, "ids is a bytes"),
        ({"documents": ["a", "b"], "ids": {"x", "y"}}, "ids is a set"),
        ({"documents": ["a", "b"], "ids": ["x", LONE]}, "id 1 holds half of a surrogate pair"),
        ({"documents": ["a", "b"], "ids": ["x", None]}, "id 1 is None (NoneType); expected a string"),
        ({"documents": ["a", "b"], "ids": np.array([1, 2])}, "id 0 is "),
        ({"documents": {"id": "text"}}, "documents is a dict; expected texts"),
        ({"documents": {"a", "b"}}, "documents is a set; expected texts"),
        ({"documents": np.array("a")}, "documents is an array of shape (); expected texts"),
        ({"embeddings": torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])}, "embedding 1 holds NaN or an infinity"),
        ({"embeddings": np.full((5000, 2, 2), -np.inf)}, "embedding 0 holds NaN or an infinity"),
        ({"embeddings": torch.zeros(2, 3, dtype=torch.int64)}, "embeddings are torch.int64"),
        ({"embeddings": torch.zeros(2, 3, dtype=torch.complex64)}, "embeddings are torch.complex64"),
        ({"embeddings": torch.zeros(2, 3).to_sparse()}, "embeddings are torch.float32 (torch.sparse_coo"),
        ({"embeddings": np.array([["a"]])}, "embeddings cannot be read as a tensor"),
        ({"embeddings": [[1.0], [1.0, 2.0]]}, "embeddings cannot be read as a tensor"),
        ({"embeddings": torch.zeros(2, 0)}, "embeddings are (2, 0); expected (N, ...)"),
        ({"embeddings": np.zeros((2, 3)), "ids": "ab"}, "found 1 ids, 2 embeddings; expected equal numbers"),
        ({"documents": ["a"], "batch_size": 0}, "batch_size is 0; expected a positive integer"),
    ],
)
@pytest.mark.parametrize("call", ["add", "build"])
def test_the_message_names_what_cannot_be_added(arguments, message, call):
    index = create()
    if call == "add":
        index.build([])
    with pytest.raises(InputError, match=re.escape(message)):
        getattr(index, call)(**arguments)
    assert len(index) == 0


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (lambda f, n: ({**f, "extra": f["scale"]}, n), "fields are code, context, extra"),
        (lambda f, n: ({**f, "scale": f["scale"].double()}, n), "field scale is torch.float64"),
        (lambda f, n: ({**f, "code": f["code"][:1]}, n), "field code"),
        (lambda f, n: (f, [1, 0]), "expected a positive count"),
        (lambda f, n: (f, [1]), "expected a positive count"),
    ],
)
def test_rows_that_do_not_fit_the_schema_raise(encoded, message):
    index = build(encode=lambda texts, *, batch_size: Encoded(*encoded(*rows_of(texts))))
    with pytest.raises(InputError, match=message):
        index.add(["a", "b"])
    assert len(index) == 0


def test_a_schema_names_what_is_wrong_with_a_field():
    with pytest.raises(InputError, match="Big"):
        Field("Big", (1,), "float32")
    with pytest.raises(InputError, match="float64"):
        Field("x", (1,), "float64")
    with pytest.raises(InputError, match="positive"):
        Field("x", (0,), "float32")
    with pytest.raises(InputError, match="distinct"):
        Schema((Field("x", (), "int8"), Field("x", (), "int8")))


def test_the_iterator_that_ends_too_early_is_named():
    index = build()
    with pytest.raises(InputError, match="ids ended after 1, before documents did"):
        index.add(iter(["a", "b"]), iter(["x"]))
    assert len(index) == 0


def test_a_value_that_cannot_be_used_does_not_fill_the_message():
    index = build()
    with pytest.raises(InputError) as caught:
        index.add([b"x" * 10**6])
    assert len(str(caught.value)) < 200


def test_arrays_of_any_strides_and_byte_order_are_embeddings():
    plain = np.array([[5.0, 1.0], [9.0, 2.0], [4.0, 3.0]])
    expected = build()
    expected.add(embeddings=plain)
    for odd in (plain[::-1][::-1], plain[::-1].copy()[::-1], plain.astype(">f8"), np.asfortranarray(plain)):
        index = build()
        assert index.add(embeddings=odd).added == 3
        assert list(index) == list(expected)
        (found,), (wanted,) = index.snapshot().chunks(9), expected.snapshot().chunks(9)
        assert found.fields["scale"].equal(wanted.fields["scale"])


def test_strings_of_numpy_generators_and_keys_of_a_dict_are_documents_and_ids(tmp_path):
    index = create(tmp_path / "index")
    index.build(np.array(["a", "b"]), np.array(["x", "y"]))
    named = {"z": "c", "u": "d"}
    index.add(named.values(), named.keys(), metadata=(item for item in [None, {"n": (1, 2)}]))
    index.add((text for text in ["e"]), (name for name in ["v"]))
    index.add("f", "w")
    assert list(reopen(tmp_path / "index")) == ["x", "y", "z", "u", "v", "w"]
    assert index.get("u") == Entry("u", "d", {"n": [1, 2]})
    assert type(index.get("x").text) is str
    assert index.verify().ok
    assert index.remove(name for name in ["x", "z"]) == 2


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_messages_name_the_bad_ids(tmp_path, place):
    index = build(None if place == "memory" else tmp_path / "index", ["a", "b"], ["x", "y"])
    with pytest.raises(DuplicateIdError, match=r"'y'.*update"):
        index.add(["c", "d"], ["z", "y"])
    with pytest.raises(DuplicateIdError, match="'z'"):
        index.add(["c", "d"], ["z", "z"])
    with pytest.raises(DuplicateIdError, match="'z'"):
        index.add(iter(["c", "d"]), iter(["z", "z"]))
    with pytest.raises(DuplicateIdError, match="'x'"):
        index.update(["c", "d"], ["x", "x"])
    with pytest.raises(UnknownIdError, match="'p', 'q'"):
        index.remove(["x", "p", "q"])
    with pytest.raises(UnknownIdError, match="'p'"):
        index.update(["c"], ["p"])
    with pytest.raises(UnknownIdError, match="'p'"):
        index.get("p")
    with pytest.raises(UnknownIdError, match="'p'"):
        index.snapshot().positions(["x", "p"])
    with pytest.raises(InputError, match="from 1 to 2"):
        index.snapshot().gather([1, 2])
    assert list(index) == ["x", "y"]


def test_reading_and_removing_accept_only_strings_as_ids(tmp_path):
    index = build(tmp_path / "index", ["a", "b"], ["a", "b"])
    with pytest.raises(InputError, match="ids is the string 'ab'"):
        index.snapshot().positions("ab")
    for use in (index.snapshot().positions, index.remove):
        with pytest.raises(InputError, match=r"id 1 is 7 \(int\); expected a string"):
            use(["a", 7])
        with pytest.raises(UnknownIdError, match="half"):
            use([LONE])
    with pytest.raises(InputError, match="ids is a NoneType"):
        index.remove(None)
    assert LONE not in index
    assert index.snapshot().positions(np.array(["b"])).tolist() == [1]
    with pytest.raises(InputError, match="size is 0"):
        next(index.snapshot().chunks(0))


def test_build_add_and_update_count_documents_the_same_way(tmp_path):
    texts = ["cut a", "b", "cut c", "b"]
    built, added = create(tmp_path / "built"), build(tmp_path / "added")
    assert built.build(texts) == added.add(texts) == AddResult(added=3, skipped=1, cut=2)
    assert added.add(iter([*texts, "cut d"])) == AddResult(added=1, skipped=4, cut=1)
    assert built.update(["cut x", "y"], list(built)[:2]) == AddResult(replaced=2, cut=1)


def run(*arguments):
    return CliRunner().invoke(app, ["index", *map(str, arguments)])


ODD = "bad\x1b[31m\u202eid"


@pytest.fixture
def path(tmp_path):
    """An index with control characters in its fingerprint, settings, texts and ids."""
    path = tmp_path / "index"
    fingerprint = {"name": ODD, "model": f"{ODD}[bold]"}
    create(path, fingerprint=fingerprint, settings={"layout": ODD}).build([f"text {ODD}", "b"], [ODD, "plain"])
    return path


def test_the_commands_print_no_control_characters_of_an_index(path):
    shown = run("info", path)
    assert shown.exit_code == 0
    assert "[bold]" in shown.output
    assert json.loads(run("info", path, "--json").output)["settings"] == {"layout": ODD}
    shard = next(path.glob("generation-*/shard-*.scale.bin"))
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    damaged = run("verify", path)
    assert damaged.exit_code == 2
    unknown = run("remove", path, "plain", ODD + "?", "two")
    assert unknown.exit_code == 2
    for result in (shown, damaged, unknown):
        assert not re.search("[\x1b\u202e]", result.output)
    assert len(CandidateIndex.open(path, None)) == 2


@pytest.mark.parametrize("command", ["info", "verify", "remove", "compact"])
@pytest.mark.parametrize("fault", ["nothing", "file", "below", "newer", "link", "broken"])
def test_the_commands_report_an_error_in_one_line(path, tmp_path, command, fault):
    given = path
    if fault == "nothing":
        given = tmp_path / "nowhere"
    elif fault in ("file", "below"):
        (tmp_path / "file").write_text("text")
        given = tmp_path / "file" if fault == "file" else tmp_path / "file" / "below"
    elif fault == "newer":
        (path / "index.json").write_text('{"kind": "mixencoder-candidate-index", "format": 99, "generation": 1}')
    elif fault == "link":
        shard = next(path.glob("generation-*/shard-*.scale.bin"))
        shard.rename(tmp_path / "shard")
        shard.symlink_to(tmp_path / "shard")
    else:
        next(path.glob("generation-*/catalogue.sqlite")).write_bytes(b"nothing of the kind" * 1000)
    result = run(command, given, *(["plain"] if command == "remove" else []))
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().split("\n")) == 1
    assert "Traceback" not in result.output
