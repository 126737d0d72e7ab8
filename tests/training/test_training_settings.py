"""Settings of a run: near types are taken, paths are paths, and what is wrong names the field."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from mixencoder.errors import DataError, InputError
from mixencoder.training.checks import check_launcher
from mixencoder.training.config import checked, data_specs
from mixencoder.training.run import DataSpec, TrainConfig, train
from tests.training.synthetic import write

ROW = {"query": "q", "positive": "p"}


def named(data, data_dir="") -> list[tuple[str, float]]:
    """Return the path and the weight of every source."""
    specs = data_specs(checked(TrainConfig(output="o", data=data, data_dir=data_dir)))
    return [(str(spec.source), spec.weight) for spec in specs]


def test_near_types_become_plain_ones():
    config = TrainConfig(
        output=Path("o"),
        data=(Path("p.jsonl"), "q.jsonl"),
        data_dir=Path("d"),
        backbone=Path("b"),
        steps=np.int64(3),
        batch_size=np.int32(2),
        seed=np.uint8(7),
        learning_rate=np.float32(0.5),
        temperature=2,
        bf16=np.bool_(True),
    )
    found = checked(config)
    values = {name: getattr(found, name) for name in ("output", "data_dir", "backbone", "steps", "batch_size", "seed")}
    assert values == {"output": "o", "data_dir": "d", "backbone": "b", "steps": 3, "batch_size": 2, "seed": 7}
    assert [type(value) for value in values.values()] == [str, str, str, int, int, int]
    assert (found.learning_rate, found.temperature, found.bf16) == (0.5, 2.0, True)
    assert type(found.learning_rate) is type(found.temperature) is float
    assert [str(spec.source) for spec in data_specs(found)] == ["d/p.jsonl", "d/q.jsonl"]
    # what is plain stays as it is
    plain = TrainConfig(output="o", data=["x"])
    assert all(getattr(checked(plain), field.name) == getattr(plain, field.name) for field in fields(plain))


@pytest.mark.parametrize(
    "data",
    [
        "p.jsonl",
        Path("p.jsonl"),
        ["p.jsonl"],
        [Path("p.jsonl")],
        np.array(["p.jsonl"]),
        {"source": "p.jsonl"},
        DataSpec("p.jsonl"),
        (DataSpec(Path("p.jsonl")),),
    ],
    ids=str,
)
def test_one_source_needs_no_list(data):
    assert named(data) == [("p.jsonl", 1.0)]


def test_rows_are_data_too():
    for data in ([[ROW, ROW]], DataSpec([ROW, ROW]), iter([ROW, ROW]), ([ROW, ROW] for _ in range(1))):
        (spec, *others) = data_specs(checked(TrainConfig(output="o", data=data)))
        assert not others
        assert spec.name == "rows"
    with pytest.raises(InputError, match="data is a list of rows"):
        checked(TrainConfig(output="o", data=[ROW]))


def test_a_path_that_exists_is_a_path_whatever_stands_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("v=2", "lang=en"):
        Path(name).mkdir()
    write(Path("lang=en/pairs.jsonl"), [ROW])
    assert named(["v=2"]) == [("v=2", 1.0)]
    assert named(["v=2=3"]) == [("v=2", 3.0)]
    assert named(["lang=en/pairs.jsonl"]) == [("lang=en/pairs.jsonl", 1.0)]
    assert named(["lang=en/pairs.jsonl=0.5"]) == [("lang=en/pairs.jsonl", 0.5)]
    assert named(["x.jsonl=2"]) == [("x.jsonl", 2.0)]
    # what is missing is not taken for a weight that is wrong
    assert named(["lang=de/pairs.jsonl"]) == [("lang=de/pairs.jsonl", 1.0)]
    with pytest.raises(InputError, match="weight of v is 'high'"):
        named(["v=high"])


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = checked(TrainConfig(output="~/o", data="~/p.jsonl", model="~/m", teacher=Path("~/t")))
    assert (found.output, found.model, found.teacher) == tuple(f"{tmp_path}/{name}" for name in "omt")
    assert named("~/p.jsonl=2", "elsewhere") == [(f"{tmp_path}/p.jsonl", 2.0)]
    assert named("p.jsonl", "~/d") == [(f"{tmp_path}/d/p.jsonl", 1.0)]
    with pytest.raises(InputError, match="~nobody-of-this-name/x"):
        checked(TrainConfig(output="~nobody-of-this-name/x", data="p"))


def test_files_of_one_name_are_told_apart_and_one_file_is_named_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "pairs.jsonl", [ROW])
    config = TrainConfig(output="o", data=[tmp_path / "a" / "pairs.jsonl", tmp_path / "b" / "pairs.jsonl"])
    assert [spec.name for spec in data_specs(checked(config))] == ["pairs", "pairs-2"]
    with pytest.raises(InputError, match="named twice; a weight says how often"):
        named([tmp_path / "a" / "pairs.jsonl", f"{tmp_path}/a/../a/pairs.jsonl=2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": 5}, "output is 5; expected a path"),
        ({"output": ""}, "output is empty"),
        ({"output": "a\0b"}, "without NUL characters"),
        ({"seed": -1}, "seed is -1; expected an integer of at least 0"),
        ({"seed": 2**32}, "seed is 4294967296; expected an integer of at most"),
        ({"steps": None}, "steps is None; expected an integer"),
        ({"steps": 2.0}, "steps is 2.0; expected an integer"),
        ({"steps": True}, "steps is True; expected an integer"),
        ({"steps": "9"}, "steps is '9'"),
        ({"max_query_tokens": 0}, "max_query_tokens is 0; expected an integer of at least 3"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; expected a number"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"learning_rate": True}, "learning_rate is True"),
        ({"bf16": "no"}, "bf16 is 'no'; expected true or false"),
        ({"resume": 1}, "resume is 1; expected true or false"),
        ({"in_batch": "x"}, "in_batch is 'x'; expected true or false or None"),
        ({"model": 7}, "model is 7; expected a path or None"),
        ({"architecture": ["x"]}, r"architecture is \['x'\]; expected a name or None"),
        ({"config": [1]}, r"config is \[1\]; expected fields with values"),
        ({"on_empty": "skip"}, "on_empty is 'skip'; expected one of special, error"),
        ({"data": [5]}, "data entry 5 is a int; expected a path, rows or a mapping"),
        ({"data": 5}, "data is 5; expected files or folders"),
        ({"data": [None]}, "data entry None is a NoneType"),
        ({"data": [""]}, "data is ''; expected a path"),
        ({"data": [{"source": 5}]}, "source of data is 5; expected a path or rows"),
        ({"data": [{"source": "x", "weight": "2"}]}, "weight of x is '2'; expected a positive number"),
        ({"data": [{"source": "x", "weight": float("nan")}]}, "weight of x is nan"),
        ({"data": [{"source": "x", "task": "rank"}]}, "task of x is 'rank'; expected one of ranking"),
        ({"data": [{"source": "x", "name": 5}]}, "name of x is 5"),
        ({"data": [{"source": "x", 5: 6}]}, "expected source, weight, task, name"),
    ],
)
def test_what_cannot_be_used_names_the_field(changes, message):
    with pytest.raises((InputError, DataError), match=message):
        data_specs(checked(TrainConfig(**{"output": "o", "data": ["p"], **changes})))


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_parted_weights_are_an_error_before_any_work(variable, tmp_path, monkeypatch):
    config = TrainConfig(output=str(tmp_path / "out"), data=[str(write(tmp_path / "data.jsonl", [ROW]))])
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match=rf"{variable}=true.*expected data-parallel processes \(DDP\).*torchrun"):
        train(config)
    assert not list(tmp_path.glob("out*"))
    monkeypatch.setenv(variable, "false")
    check_launcher()
