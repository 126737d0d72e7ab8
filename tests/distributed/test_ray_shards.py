"""Ranking shards in Ray actors: equal to one index bit for bit, also when an actor is killed; late shards are named."""

import itertools
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from mixencoder import MixEncoder
from mixencoder.errors import InputError
from tests.conftest import WORDS
from tests.distributed.conftest import actor_processes

pytest.importorskip("ray", reason="ray is not installed; .ci/integrations installs it")
pytestmark = pytest.mark.usefixtures("cluster")

TEXTS = [f"{a} {b} {c}" for a in WORDS[:10] for b in WORDS[:8] for c in WORDS[:9]]
# equal texts give equal scores, in one shard and over two
TEXTS[700:] = TEXTS[: len(TEXTS) - 700]
IDS = [f"id {number}" for number in range(len(TEXTS))]
QUERIES = ["boil water", f"{WORDS[3]} {WORDS[5]}"]
BOUNDS = (0, 300, 300, 500, len(TEXTS))


@pytest.fixture(scope="module")
def model(backbone_path):
    torch.manual_seed(0)
    return MixEncoder.from_backbone(backbone_path, dual_term=True)


@pytest.fixture(scope="module")
def whole(model):
    return model.index(TEXTS, IDS)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    for number, (first, last) in enumerate(itertools.pairwise(BOUNDS)):
        model.index(TEXTS[first:last], IDS[first:last], path / f"s{number}").close()
    return path


@pytest.fixture(scope="module")
def shards(model, folder):
    from mixencoder.distributed.ray_shards import RayShards

    with RayShards(model, folder) as found:
        yield found


def actors_without(process=None):
    """Wait until all four actors run in other processes than one, and return theirs; a title changes with each call."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = actor_processes("_Shard")
        if len(found) == 4 and process not in found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"found the actors {found}; expected four")


@pytest.mark.parametrize("prefilter", [None, "auto", 7])
@pytest.mark.parametrize("top_k", [1, 12])
def test_actors_rank_as_one_index(shards, model, whole, prefilter, top_k):
    found = shards.rank(QUERIES, top_k, prefilter=prefilter, return_documents=True)
    assert not found.partial
    assert found.rankings == model.rank(QUERIES, whole, top_k, prefilter=prefilter, return_documents=True)


def test_other_scores_and_all_documents(shards, model, whole):
    assert shards.rank(QUERIES[0], len(TEXTS), score="dual").rankings == [
        model.rank(QUERIES[0], whole, len(TEXTS), score="dual")
    ]
    assert len(shards) == len(TEXTS)
    assert shards.documents == [300, 0, 200, len(TEXTS) - 500]


def test_a_killed_actor_is_started_again_and_nothing_changes(shards, model, whole):
    right = model.rank(QUERIES, whole, 10, prefilter=None)
    wrong, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            if shards.rank(QUERIES, 10, prefilter=None).rankings != right:
                wrong.append(1)

    asking = threading.Thread(target=ask)
    asking.start()
    before = actors_without()
    os.kill(before[1], signal.SIGKILL)
    after = actors_without(before[1])
    stop.set()
    asking.join(120)
    assert len(set(after) - set(before)) == 1
    assert not wrong
    assert shards.rank(QUERIES, 10, prefilter=None).rankings == right


def test_a_shard_that_does_not_answer_in_time_is_named(shards, model, folder):
    found = actors_without()
    # which shards they hold is not known here, but at most one is empty and so is not asked
    for process in found[:2]:
        os.kill(process, signal.SIGSTOP)
    try:
        late = shards.rank(QUERIES, 5, prefilter=None, deadline=5.0)
    finally:
        for process in found[:2]:
            os.kill(process, signal.SIGCONT)
    assert late.partial
    assert len(late.missing) in (1, 2)
    assert {Path(name).parent for name in late.missing} == {folder}
    rest = [folder / f"s{n}" for n in (0, 2, 3) if str(folder / f"s{n}") not in late.missing]
    with model.open_index(rest) as index:
        expected = [[entry["id"] for entry in ranking] for ranking in model.rank(QUERIES, index, 5, prefilter=None)]
    assert [[entry["id"] for entry in ranking] for ranking in late.rankings] == expected
    assert not shards.rank(QUERIES, 5).partial


def test_what_cannot_be_ranked_is_said(shards, model, tmp_path):
    from mixencoder.distributed.ray_shards import RayShards

    with pytest.raises(InputError, match="0 queries"):
        shards.rank([], 5)
    with pytest.raises(InputError, match="deadline is 0"):
        shards.rank(QUERIES, 5, deadline=0)
    model.index(TEXTS[:3], path=tmp_path / "one").close()
    with pytest.raises(InputError, match="is no folder of shards"):
        RayShards(model, tmp_path / "one")
