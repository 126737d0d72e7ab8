"""Serve a sharded index with Ray Serve: ``python docs/examples/ray_serve.py SHARDS``.

Answers what ``mixencoder serve`` answers (docs/serving.md), for an index that many machines hold. Ray Serve runs and
scales the replicas that speak HTTP: they encode queries, and rank texts that requests carry. The shards of the index
are ranked in the actors of `RayShards`, which all these replicas share. Needs ``pip install 'mixencoder[ray,serve]'``.
docs/scale.md says what scales, and what a lost machine does to requests.
"""

import argparse
from typing import Any

from mixencoder import MixEncoder
from mixencoder.distributed.ray_shards import RayShards


def application(
    shards: RayShards,
    folder: str,
    model: str | None = None,
    *,
    cpus: int = 1,
    replicas: tuple[int, int] = (1, 4),
    deadline: float | None = 2.0,
) -> Any:
    """Return the application, for `ray.serve.run`.

    Args:
        shards: must stay open while the application runs.
        folder: of the shards, from which texts and metadata are read.
        model: the checkpoint that `shards` was made with; None takes the bundled one.
        cpus: cores, and threads, of each replica.
        replicas: fewest and most.
        deadline: seconds after which a request that a shard has not answered gets a 503.
    """
    from ray import serve

    def build() -> Any:
        """Return the ASGI application; called in every replica."""
        from ray.exceptions import RayActorError

        from mixencoder.serving.app import create_app
        from mixencoder.serving.errors import RequestError
        from mixencoder.serving.ranking import quiet_engine
        from mixencoder.serving.settings import ServeConfig

        def rank_stored(
            engine: MixEncoder, queries: list[str], top_k: int | None, ids: list[str] | None
        ) -> list[list[Any]]:
            again = {"Retry-After": "1"}
            try:
                found = shards.rank_states(engine.query_states(queries), top_k, ids=ids, deadline=deadline)
            except RayActorError as error:
                raise RequestError(503, "unhealthy", "a shard of the index is lost; try again", again) from error
            if found.partial:
                raise RequestError(503, "unhealthy", "a shard of the index did not answer in time; try again", again)
            return found.rankings

        engine = MixEncoder.from_pretrained(model)
        index = quiet_engine(engine).open_index(folder, read_only=True)
        return create_app(ServeConfig(threads=cpus), engine, index, rank_stored=rank_stored)

    fewest, most = replicas
    return serve.deployment(
        serve.ingress(build)(),
        name="ranking",
        ray_actor_options={"num_cpus": cpus},
        # requests that wait in a replica share its passes
        max_ongoing_requests=64,
        autoscaling_config={"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": 8},
    ).bind()


def main() -> None:
    """Make the actors, and serve until ctrl-c."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="a sharded index, which every machine reaches under this path")
    parser.add_argument("--model", help="checkpoint (default: the bundled one)")
    parser.add_argument("--address", help="of a running cluster; auto finds it (default: start Ray on this machine)")
    parser.add_argument("--replicas", type=int, default=2, help="actors per shard")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    engine = MixEncoder.from_pretrained(options.model)
    with RayShards(engine, options.folder, replicas=options.replicas, address=options.address) as shards:
        from ray import serve

        serve.start(http_options={"host": options.host, "port": options.port})
        serve.run(application(shards, options.folder, options.model), blocking=True)


if __name__ == "__main__":
    main()
