"""The candidate index on disk: build, open, update, rank; against a file of vectors written by torch.save.

The rival does less: no ids, no transaction, no flush to disk, nothing of the first layer stored.
"""

import shutil
import tempfile
from collections.abc import Callable, Collection
from functools import cache, partial
from itertools import count as counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.index.speed import plain_scores
from benchmarks.measuring.costs import (
    MINILM,
    copy_cost,
    dot_products_cost,
    encoder_cost,
    interaction_cost,
    projection_cost,
    query_cost,
)
from benchmarks.measuring.models import engine
from benchmarks.suite.case import Case, Contender, Prepared
from benchmarks.suite.end_to_end import QUERY_TOKENS, TOP_K, contexts, query_text
from mixencoder import MixEncoder
from mixkernels.roofline import Cost

CANDIDATES, CHANGED, PREFILTER = 10_000, 100, 100
RIVAL = "torch.save"


@cache
def scratch() -> tempfile.TemporaryDirectory:
    """A folder that lasts as long as the process."""
    return tempfile.TemporaryDirectory()


def _scratch_path(name: str) -> Path:
    return Path(scratch().name, name)


def index_case(
    operator: str,
    prepare: Callable[[Collection[str]], Prepared],
    rivals: tuple[str, ...] = (RIVAL,),
    variant: str = "",
    *,
    quick: bool = False,
) -> Case:
    """One operation of an index; `quick`: CI compares it with all rivals."""
    sizes = {"N": CANDIDATES, "k": 1, "d": MINILM.d} | ({"changed": CHANGED} if operator == "update" else {})
    shown = rivals if quick else ()
    return Case("index", operator, sizes, torch.float32, ("index",), rivals, prepare, variant=variant, quick=shown)


def _accept_any_result(name: str, result: Any) -> None:
    """Check nothing: the contenders only write."""


def _prepare_build(names: Collection[str]) -> Prepared:
    context, number = contexts(CANDIDATES), counter()
    target, made = _scratch_path("vectors.pt"), _scratch_path("built")

    def build() -> int:
        shutil.rmtree(made, ignore_errors=True)
        return len(_built(context, made / str(next(number))))

    stored = CANDIDATES * _row_bytes()
    projected = projection_cost(MINILM, CANDIDATES, 1, torch.float32).and_then(copy_cost(stored))
    return Prepared(
        {
            "index": Contender(build, projected, facts={"written": "projected float16"}),
            RIVAL: Contender(
                partial(torch.save, context.half(), target),
                copy_cost(context.nbytes // 2),
                facts={"written": "E_0, float16"},
            ),
        },
        _accept_any_result,
    )


def _built(context: Tensor, path: Path) -> Any:
    index = engine(MixEncoder).index(
        ids=map(str, range(len(context))), embeddings=context, path=path, store_text=False, show_progress_bar=False
    )
    index.close()
    return range(len(context))


@cache
def _row_bytes() -> int:
    return engine(MixEncoder).index(embeddings=contexts(1), store_text=False).info()["row_bytes"]


@cache
def _files() -> tuple[Path, Path]:
    """An index and a file of the same candidates."""
    context, folder, file = contexts(CANDIDATES), _scratch_path("index"), _scratch_path("kept.pt")
    _built(context, folder)
    torch.save(context.half(), file)
    return folder, file


def _prepare_open(names: Collection[str]) -> Prepared:
    folder, file = _files()

    def opened() -> int:
        with engine(MixEncoder).open_index(folder, read_only=True) as index:
            return len(index)

    def check(name: str, result: Any) -> None:
        found = result if isinstance(result, int) else len(result)
        if found != CANDIDATES:
            raise AssertionError(f"{name} opened {found} candidates; expected {CANDIDATES}")

    return Prepared(
        {
            "index": Contender(opened, facts={"checks": "fingerprint, sizes of all files"}),
            RIVAL: Contender(partial(torch.load, file, mmap=True), facts={"checks": "none"}),
        },
        check,
        # opening must read one page at least; candidates are read at the first query
        Cost(0, 4096, 0),
    )


def _prepare_update(names: Collection[str]) -> Prepared:
    folder, file = _files()
    own, by_hand = _scratch_path("updated"), _scratch_path("updated.pt")
    shutil.copytree(folder, own, dirs_exist_ok=True)
    shutil.copy(file, by_hand)
    fresh, ids = contexts(CHANGED), [str(number) for number in range(CHANGED)]
    index = engine(MixEncoder).open_index(own)

    def rewrite() -> None:
        vectors = torch.load(by_hand)
        vectors[:CHANGED] = fresh
        torch.save(vectors, by_hand)

    return Prepared(
        {
            "index": Contender(
                partial(index.update, ids=ids, embeddings=fresh, show_progress_bar=False),
                facts={"written": "the changed rows, flushed"},
            ),
            RIVAL: Contender(rewrite, facts={"written": "the whole file"}),
        },
        _accept_any_result,
        projection_cost(MINILM, CHANGED, 1, torch.float32).and_then(copy_cost(CHANGED * _row_bytes())),
    )


def _prepare_rank(names: Collection[str]) -> Prepared:
    folder, file = _files()
    mix, dtype = engine(MixEncoder), torch.float32
    index, vectors = mix.open_index(folder, read_only=True), torch.load(file, mmap=True)

    def by_hand() -> Any:
        state = mix.encode_query([query_text()])
        return plain_scores(mix.model, state, vectors[:, 0].float()).topk(TOP_K)

    once = query_cost(MINILM, QUERY_TOKENS, dtype)
    rest = partial(interaction_cost, MINILM, CANDIDATES, 1, QUERY_TOKENS, dtype)

    def check(name: str, result: Any) -> None:
        scores = [entry["score"] for entry in result] if isinstance(result, list) else result.values.tolist()
        expected = by_hand().values.tolist()
        if not torch.allclose(torch.tensor(scores), torch.tensor(expected), rtol=0.02, atol=0.02):
            raise AssertionError(f"{name} found scores {scores}; expected about {expected}")

    return Prepared(
        {
            "index": Contender(
                partial(mix.rank, query_text(), index, TOP_K, prefilter=None),
                once.and_then(rest(stored_bytes=_row_bytes())),
            ),
            "plain PyTorch": Contender(
                by_hand,
                once.and_then(projection_cost(MINILM, CANDIDATES, 1, dtype)).and_then(rest(stored_bytes=0)),
            ),
        },
        check,
    )


def _prepare_prefilter(names: Collection[str]) -> Prepared:
    """Rank with the dual term over all candidates and the interaction over the best of them, against the latter alone.

    The rival computes the interaction of every candidate in plain PyTorch, without the dual term.
    """
    _, file = _files()
    mix, dtype = engine(MixEncoder, dual_term=True), torch.float32
    vectors = torch.load(file, mmap=True)
    index = mix.index(embeddings=vectors.float(), store_text=False, show_progress_bar=False)
    text, stored = query_text(), index.info()["row_bytes"]
    whole = {entry["corpus_id"]: entry["score"] for entry in mix.rank(text, index, CANDIDATES, prefilter=None)}
    kept = {entry["corpus_id"] for entry in mix.rank(text, index, PREFILTER, score="dual")}
    expected = sorted((whole[position] for position in kept), reverse=True)[:TOP_K]

    def by_hand() -> Any:
        return plain_scores(mix.model, mix.encode_query([text]), vectors[:, 0].float()).topk(TOP_K)

    def check(name: str, result: Any) -> None:
        if name != "index":
            return
        scores = [entry["score"] for entry in result]
        if not torch.allclose(torch.tensor(scores), torch.tensor(expected), rtol=1e-4, atol=1e-3):
            raise AssertionError(f"{name} found scores {scores}; expected about {expected}")

    every = partial(interaction_cost, MINILM, k=1, tokens=QUERY_TOKENS, dtype=dtype)
    query = encoder_cost(MINILM, 1, QUERY_TOKENS, dtype)
    dual = dot_products_cost(CANDIDATES, torch.float16, size=MINILM.d)
    return Prepared(
        {
            "index": Contender(
                partial(mix.rank, text, index, TOP_K, prefilter=PREFILTER),
                query.and_then(dual).and_then(every(candidates=PREFILTER, stored_bytes=stored)),
            ),
            "plain PyTorch": Contender(
                by_hand,
                query.and_then(projection_cost(MINILM, CANDIDATES, 1, dtype)).and_then(
                    every(candidates=CANDIDATES, stored_bytes=0)
                ),
            ),
        },
        check,
    )


CASES = (
    index_case("build", _prepare_build),
    index_case("open", _prepare_open),
    index_case("update", _prepare_update),
    index_case("rank", _prepare_rank, ("plain PyTorch",)),
    index_case("rank", _prepare_prefilter, ("plain PyTorch",), variant=f"prefilter={PREFILTER}", quick=True),
)
