"""Build a sharded index with Ray Data: each worker is an actor with one model, which encodes one shard after another.

Ray keeps the workers: it starts them, gives the shard of a lost one to another, and shows the progress. A killed driver
continues where shards are complete when the same call is made again.
"""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mixencoder.base.inputs import local_path, positive_integer
from mixencoder.distributed.plan import (
    Built,
    Part,
    Reading,
    Source,
    begin,
    build_shard,
    count_rows,
    cut,
    find_sources,
    finish,
)
from mixencoder.durable import exclusive
from mixencoder.errors import DataError, InputError, MissingExtraError
from mixencoder.fast import MixEncoder

SHARD_ROWS = 100_000
"""Documents of a shard, unless another number is given; a lost worker costs at most one shard's time."""


class Workers(NamedTuple):
    """The actors that encode.

    Attributes:
        count: how many; None takes as many as the cluster has cores or GPUs for.
        cpus: cores of each, which is also the number of its threads.
        gpus: GPUs of each: 0, a fraction, or 1.
    """

    count: int | None = None
    cpus: int = 1
    gpus: float = 0.0


WORKERS = Workers()
"""One core each, as many as there is room for."""


class BuildResult(NamedTuple):
    """What was built: documents of all shards, shards, and how many of these an earlier run had finished."""

    documents: int
    shards: int
    held: int


def build_index(
    engine: MixEncoder,
    path: str | Path,
    candidates: str,
    *,
    column: str | None = None,
    format: str | None = None,
    precision: str = "float16",
    layout: str = "projected",
    on_overflow: str = "truncate",
    store_text: bool = True,
    batch_size: int = 32,
    shard_rows: int = SHARD_ROWS,
    workers: Workers = WORKERS,
    address: str | None = None,
) -> BuildResult:
    """Encode files of candidates into a folder of shards, each an index of its own, with Ray Data.

    The documents, their order and their rows are those of `MixEncoder.index` over the same files, one after another.
    If this is interrupted, the same call continues: finished shards are not encoded again.

    Args:
        engine: the model; a copy of it goes to every worker.
        path: a new or empty folder, or one with an unfinished build; all workers must reach it under this path.
        candidates: a file, a pattern such as ``texts/*.parquet``, or a URI; all workers must reach them.
        column, format: as in `mixencoder.data.candidates.iterate_candidates`.
        precision, layout, on_overflow, store_text, batch_size: as in `MixEncoder.index`.
        shard_rows: most documents of a shard.
        workers: how many actors, and what each takes of its machine.
        address: of a running cluster ("auto" finds it); None starts Ray on this machine, unless it runs already.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: an option cannot be used.
        DataError: a file cannot be read, or there is no candidate.
        DuplicateIdError: an id is given twice over all files.
        IndexStateError: the folder holds something else.
        ray.exceptions.RayError: the cluster failed, or a worker raised an error.
    """
    folder, reading = Path(os.path.abspath(local_path(path))), Reading(column, format)  # noqa: PTH100
    shard_rows = positive_integer(shard_rows, "shard_rows")
    if workers.cpus < 1 or workers.gpus < 0 or (workers.count is not None and workers.count < 1):
        raise InputError(
            f"workers is {workers}; expected at least one worker, with at least one core and no fewer GPUs"
        )
    found = [(name if "://" in name else os.path.abspath(name), size) for name, size in find_sources(candidates)]  # noqa: PTH100
    options: dict[str, Any] = {
        "precision": precision,
        "layout": layout,
        "on_overflow": on_overflow,
        "store_text": store_text,
    }
    # wrong options raise here rather than in every worker
    with engine.index([], None, **options) as empty:
        fingerprint, settings = empty.fingerprint, empty.settings
    ray = start_ray(address)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        sources = _counted(ray, found, reading)
        parts = cut(sources, shard_rows)
        if not parts:
            raise DataError(f"{candidates} holds no candidate")
        plan = {"fingerprint": fingerprint, "settings": settings, "store_text": store_text, "shard_rows": shard_rows}
        plan |= {"reading": list(reading), "sources": [list(source) for source in sources]}
        begin(folder, plan)
        options["batch_size"] = positive_integer(batch_size, "batch_size")
        built = _built(ray, engine, folder, parts, reading, options, workers)
        documents = finish(folder, [part.name for part in parts])
    return BuildResult(documents, len(parts), sum(shard.held for shard in built))


def start_ray(address: str | None = None, *, held_cores: int = 0) -> Any:
    """Return the module `ray`, connected to a cluster: the one that is connected, the one at an address, or a new one.

    Args:
        address: of a running cluster.
        held_cores: cores that actors will hold. Ray only counts cores, so a new cluster on this machine gets as many in
            addition to its own: with fewer, what needs another core would wait for ever.

    Raises:
        MissingExtraError: it is not installed.
    """
    # Ray reports its usage to its makers unless this is set
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError(f"this needs Ray: pip install 'mixencoder[ray]' ({error})") from error
    if not ray.is_initialized():
        cores = (os.cpu_count() or 1) + held_cores
        local: dict[str, Any] = {} if address else {"include_dashboard": False, "num_cpus": cores}
        ray.init(address=address, configure_logging=False, **local)
    return ray


class _ShardEncoder:
    """The actor: builds the shards that Ray Data hands it, one row of a batch each."""

    def __init__(
        self, engine: Sequence[Any], folder: str, reading: Reading, options: dict[str, Any], threads: int, on_gpu: bool
    ) -> None:
        import ray

        torch.set_num_threads(threads)
        loaded: MixEncoder = ray.get(engine[0])
        self._engine = loaded.to("cuda") if on_gpu else loaded
        self._folder, self._reading, self._options = Path(folder), Reading(*reading), options

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        columns = (batch[name].tolist() for name in Part._fields)
        parts = [Part(*values) for values in zip(*columns, strict=True)]
        built = [build_shard(self._engine, self._folder, part, self._reading, self._options) for part in parts]
        return {name: [getattr(shard, name) for shard in built] for name in Built._fields}


def _counted(ray: Any, found: Sequence[tuple[str, int]], reading: Reading) -> list[Source]:
    """Count the rows of files, each as a task of Ray."""
    count = ray.remote(num_cpus=1)(count_rows)
    rows = ray.get([count.remote(path, reading) for path, _ in found])
    return [Source(path, size, number) for (path, size), number in zip(found, rows, strict=True)]


def _built(
    ray: Any,
    engine: MixEncoder,
    folder: Path,
    parts: Sequence[Part],
    reading: Reading,
    options: dict[str, Any],
    workers: Workers,
) -> list[Built]:
    """Build the shards, and return them in order."""
    available = ray.cluster_resources()
    fitting = int(available.get("CPU", 1) // workers.cpus)
    if workers.gpus:
        fitting = min(fitting, int(available.get("GPU", 0) // workers.gpus))
    count = min(workers.count or max(fitting, 1), len(parts))
    # in a list: Ray would replace an argument that is a reference by its value, in every task
    held = [ray.put(engine if engine.device.type == "cpu" else copy.deepcopy(engine).to("cpu"))]
    data = ray.data.from_items([part._asdict() for part in parts], override_num_blocks=len(parts))
    encoded = data.map_batches(
        _ShardEncoder,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
        fn_constructor_args=(
            held,
            str(folder),
            tuple(reading),
            options,
            workers.cpus,
            workers.gpus > 0,
        ),
    )
    built = [Built(**{name: row[name] for name in Built._fields}) for row in encoded.iter_rows()]
    return sorted(built)
