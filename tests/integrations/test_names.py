"""docs/sentence-transformers.md: its tables hold for the installed library and for ours, name by name."""

import inspect
import re

import numpy as np
import pytest
import torch

from mixencoder import MixEncoder
from tests.project.test_docs import DOCS

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

from sentence_transformers import CrossEncoder

from tests.integrations.texts import QUERY, TEXTS

PAGE = (DOCS / "sentence-transformers.md").read_text(encoding="utf-8")
CALLS = {
    "predict": (CrossEncoder.predict, MixEncoder.predict),
    "rank": (CrossEncoder.rank, MixEncoder.rank),
    "The constructor, here from_pretrained": (CrossEncoder.__init__, MixEncoder.from_pretrained),
    "save_pretrained": (CrossEncoder.save_pretrained, MixEncoder.save_pretrained),
    "push_to_hub": (CrossEncoder.push_to_hub, MixEncoder.push_to_hub),
}


def section(heading: str) -> str:
    return re.split(r"^##+ ", PAGE.split(f" {heading}\n", 1)[1], flags=re.M)[0]


def rows(heading: str) -> dict[str, str]:
    """Return what the second column says, by the name in the first."""
    found = re.findall(r"^\| `(\w+)` \| (.*?) \|", section(heading), flags=re.M)
    assert len(dict(found)) == len(found)
    return {name: here.strip("`") for name, here in found if name != "CrossEncoder"}


def parameters(function) -> dict[str, inspect.Parameter]:
    return {
        name: entry
        for name, entry in inspect.signature(function).parameters.items()
        if name not in ("self", "cls") and entry.kind is not entry.VAR_KEYWORD
    }


@pytest.mark.parametrize("heading", CALLS)
def test_every_argument_is_named_with_what_it_is_here(heading):
    theirs, ours = map(parameters, CALLS[heading])
    table = rows(heading)
    assert list(table) == list(theirs)
    used = set()
    for name, here in table.items():
        if here == "none":
            assert name not in ours, name
        elif here == "other":
            assert name in ours
            used.add(name)
        elif here in ("same", "keyword"):
            assert ours[name].default == theirs[name].default, name
            expected = ours[name].KEYWORD_ONLY if here == "keyword" else ours[name].POSITIONAL_OR_KEYWORD
            assert ours[name].kind is expected, name
            used.add(name)
        else:
            assert name not in ours, name
            assert here in ours, here
            used.add(here)
    new = re.findall(r"^New here: (.*)\.$", section(heading), flags=re.M)
    named = set(re.findall(r"`(\w+)`", new[0])) if new else set()
    assert named == set(ours) - used


def test_every_method_and_attribute_is_named_with_what_it_is_here(model):
    def owner(name):
        return next(parent for parent in CrossEncoder.__mro__ if name in parent.__dict__)

    public = {
        name
        for name in dir(CrossEncoder)
        if not name.startswith("_") and owner(name).__module__.startswith("sentence_transformers")
    }
    # an attribute that a constructor sets
    table = rows("Methods and attributes")
    assert set(table) == public
    for name, here in table.items():
        if here == "none":
            assert not hasattr(model, name), name
        elif here == "same":
            assert hasattr(model, name), name
        else:
            assert not hasattr(model, name), name
            assert hasattr(model, here), here


PAIRS = [(QUERY, text) for text in TEXTS]


def test_values_of_other_libraries_are_taken(model, checkpoint):
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    expected = model.predict(PAIRS)
    frame = pd.DataFrame(PAIRS, columns=["query", "text"], index=[7, 8, 9, 10])
    forms = [
        frame.to_numpy(),
        pd.Series(PAIRS, index=frame.index),
        zip(frame["query"], frame["text"], strict=True),
        (list(pair) for pair in PAIRS),
        np.array(PAIRS),
    ]
    for pairs in forms:
        assert np.array_equal(model.predict(pairs), expected)
    ranking = model.rank(QUERY, frame["text"], np.int64(2), batch_size=np.int32(2))
    assert ranking == model.rank(QUERY, TEXTS, 2)
    assert model.rank(QUERY, (text for text in TEXTS), 2) == ranking
    assert MixEncoder.from_pretrained(checkpoint, device="auto", dtype="bf16").dtype == torch.bfloat16
