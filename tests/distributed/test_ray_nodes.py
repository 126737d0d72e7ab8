"""Replicas of shards lie on different machines, and a lost machine changes no ranking; machines are played by nodes."""

import itertools
import time

import pytest

from mixencoder import MixEncoder
from tests.conftest import WORDS
from tests.distributed.conftest import set_environment

ray = pytest.importorskip("ray", reason="ray is not installed; .ci/integrations installs it")

TEXTS = [f"{a} {b} {c}" for a, b, c in itertools.product(WORDS[:8], WORDS[:8], WORDS[:6])]
IDS = [f"id {number}" for number in range(len(TEXTS))]
QUERIES = ["boil water", "undo the git commit"]


@pytest.fixture
def nodes():
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch)
        # no actor fits on the driver's machine
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2**27})
        try:
            workers = [found.add_node(num_cpus=4, object_store_memory=2**27) for _ in range(2)]
            ray.init(address=found.address, configure_logging=False)
            yield found, workers
        finally:
            ray.shutdown()
            found.shutdown()


def test_a_lost_machine_changes_no_ranking(checkpoint, tmp_path, nodes):
    from mixencoder.distributed.ray_shards import RayShards

    cluster, workers = nodes
    model = MixEncoder.from_pretrained(checkpoint)
    for number, rows in enumerate((slice(0, 150), slice(150, None))):
        model.index(TEXTS[rows], IDS[rows], tmp_path / f"s{number}").close()
    right = model.rank(QUERIES, model.index(TEXTS, IDS), 10)
    with RayShards(model, tmp_path, replicas=2) as shards:
        for _ in range(4):
            assert shards.rank(QUERIES, 10).rankings == right
        homes = [[node_of(replica) for replica in replicas] for replicas in shards._actors._replicas]
        assert all(len(set(of_shard)) == 2 for of_shard in homes)
        cluster.remove_node(workers[0], allow_graceful=False)
        # the other replicas answer: a machine that starts actors again takes longer than these rankings
        end, answered = time.monotonic() + 10, 0
        while time.monotonic() < end:
            assert shards.rank(QUERIES, 10, deadline=60).rankings == right
            answered += 1
        assert answered > 3
        # the lost replicas run again, on the machine that is left
        left = next(iter({home for of_shard in homes for home in of_shard} - {workers[0].node_id}))
        for replicas in shards._actors._replicas:
            assert [node_of(replica) for replica in replicas] == [left] * 2
        for _ in range(4):
            assert shards.rank(QUERIES, 10).rankings == right


def node_of(replica):
    """Return the id of the node of a replica, as soon as it runs."""
    return ray.get(replica.actor.ready.options(max_task_retries=-1).remote()).node
