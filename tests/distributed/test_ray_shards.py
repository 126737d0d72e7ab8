"""Ranking shards in Ray actors: equal to one index bit for bit, also when an actor is killed; late shards are named."""

import itertools
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks.processes.ray_build import actor_processes
from mixencoder import MixEncoder
from mixencoder.errors import DuplicateIdError, InputError, UnknownIdError
from tests.conftest import WORDS

ray = pytest.importorskip("ray", reason="ray is not installed; .ci/integrations installs it")
cloudpickle = pytest.importorskip("ray.cloudpickle")
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
@pytest.mark.parametrize("top_k", [1, 12, None])
def test_actors_rank_as_one_index(shards, model, whole, prefilter, top_k):
    options = {"prefilter": prefilter, "return_documents": True}
    found = shards.rank(QUERIES, top_k, **options)
    assert not found.partial
    assert found.rankings == model.rank(QUERIES, whole, top_k, **options)


@pytest.mark.parametrize("options", [{"score": "dual"}, {"products": "int8"}, {"products": "int8", "prefilter": 50}])
def test_other_scores_and_products(shards, model, whole, options):
    found = shards.rank(QUERIES[0], 20, **options).rankings
    assert found == [model.rank(QUERIES[0], whole, 20, **options)]
    assert len(shards) == len(TEXTS)
    assert shards.documents == [300, 0, 200, len(TEXTS) - 500]


@pytest.mark.parametrize("prefilter", [None, 5])
@pytest.mark.parametrize("top_k", [3, None])
def test_documents_with_given_ids(shards, model, whole, prefilter, top_k):
    # from two shards, out of order, with equal texts
    ids = [IDS[number] for number in (719, 3, 299, 500, 19, 0, 501, 700)]
    expected = model.rank(QUERIES, whole, top_k, ids=ids, prefilter=prefilter)
    assert shards.rank(QUERIES, top_k, ids=ids, prefilter=prefilter).rankings == expected
    assert shards.rank(QUERIES, 3, ids=ids[:1]).rankings == model.rank(QUERIES, whole, 3, ids=ids[:1])
    with pytest.raises(UnknownIdError, match="no document has the id 'x', 'y'"):
        shards.rank(QUERIES, 3, ids=["x", *ids, "y"])
    with pytest.raises(DuplicateIdError, match="'id 0' more than once"):
        shards.rank(QUERIES, 3, ids=[*ids, "id 0"])


def test_a_copy_in_another_process_ranks_by_states(shards, model, whole):
    @ray.remote(num_cpus=0)
    def best(copy, states):
        found = copy.rank_states(states, 5)
        copy.close()
        return found

    states = model.query_states(QUERIES)
    for _ in range(2):
        assert ray.get(best.remote(shards, states)).rankings == model.rank(QUERIES, whole, 5)
    with pytest.raises(InputError, match="a copy of RayShards has no model"):
        cloudpickle.loads(cloudpickle.dumps(shards)).rank(QUERIES, 5)


def test_a_killed_actor_is_started_again_and_nothing_changes(shards, model, whole):
    right = model.rank(QUERIES, whole, 10, prefilter=None)
    found, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            found.append(None)
            found[-1] = shards.rank(QUERIES, 10, prefilter=None).rankings

    asking = threading.Thread(target=ask)
    asking.start()
    before = actors_without()
    os.kill(before[1], signal.SIGKILL)
    after = actors_without(before[1])
    stop.set()
    asking.join(120)
    assert len(set(after) - set(before)) == 1
    assert found
    # one that raised an error is still None
    assert all(rankings == right for rankings in found)
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


def test_the_other_replica_answers_while_a_lost_one_is_started_again(model, folder, whole):
    from mixencoder.distributed.ray_shards import RayShards

    right = model.rank(QUERIES, whole, 10)
    with RayShards(model, [folder / "s0", folder / "s2"], replicas=2, cpus=1) as shards:
        with model.open_index([folder / "s0", folder / "s2"]) as index:
            right = model.rank(QUERIES, index, 10)
        # two shards of two replicas each, beside the actors of other tests
        for _ in range(4):
            assert shards.rank(QUERIES, 10).rankings == right
        processes = [replica_process(shards, 0, number) for number in range(2)]
        assert len(set(processes)) == 2
        os.kill(processes[0], signal.SIGKILL)
        times = []
        for _ in range(20):
            begin = time.monotonic()
            assert shards.rank(QUERIES, 10).rankings == right
            times.append(time.monotonic() - begin)
        # a new process takes seconds to import and to open its shard
        started = time.monotonic()
        again = replica_process(shards, 0, 0)
        assert again != processes[0]
        waited = time.monotonic() - started
        assert max(times) < max(1.0, waited), (times, waited)
        for _ in range(4):
            assert shards.rank(QUERIES, 10).rankings == right
        # both are lost: the call waits for the first that runs again
        for number in range(2):
            os.kill(replica_process(shards, 0, number), signal.SIGKILL)
        assert shards.rank(QUERIES, 10).rankings == right


def replica_process(shards, shard, number):
    """Return the process id of a replica, as soon as it runs."""
    actor = shards._actors._replicas[shard][number].actor
    return ray.get(actor.ready.options(max_task_retries=-1).remote()).process


def test_a_shard_that_has_changed_is_not_ranked(model, tmp_path):
    from mixencoder.distributed.ray_shards import RayShards

    for name in "ab":
        model.index(TEXTS[:3], path=tmp_path / name).close()
    with RayShards(model, [tmp_path / "a", tmp_path / "b"], cpus=1) as shards:
        assert len(shards.rank(QUERIES, 10).rankings[0]) == 6
        with model.open_index(tmp_path / "b") as index:
            index.add(["a cat sat"])
        # the running actors keep their commit
        assert len(shards.rank(QUERIES, 10).rankings[0]) == 6
        os.kill(replica_process(shards, 1, 0), signal.SIGKILL)
        with pytest.raises(Exception, match="holds 4 documents; expected 3") as error:
            shards.rank(QUERIES, 10)
        assert isinstance(error.value, ray.exceptions.RayActorError)


def test_what_cannot_be_ranked_is_said(shards, model, tmp_path):
    from mixencoder.distributed.ray_shards import RayShards

    with pytest.raises(InputError, match="0 queries"):
        shards.rank([], 5)
    with pytest.raises(InputError, match="deadline is 0"):
        shards.rank(QUERIES, 5, deadline=0)
    model.index(TEXTS[:3], path=tmp_path / "one").close()
    with pytest.raises(InputError, match="is no folder of shards"):
        RayShards(model, tmp_path / "one")
