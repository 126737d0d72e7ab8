"""The table of docs/determinism.md, row by row, at the size of the bundled model, on whatever processor this is.

Every test compares bits, for one, two and three threads (three share elementwise work out unevenly).
"""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from mixencoder import MixEncoder
from mixencoder.base.checkpoints.checkpoint import load_tokenizer
from mixencoder.bundled import default_checkpoint
from mixencoder.configuration import MixEncoderConfig
from mixencoder.modeling import MixEncoderModel, QueryState
from mixencoder.ranking.record_format import RecordFormat
from mixencoder.ranking.streaming import StreamRanker
from mixkernels.devices import multiplies_natively

N = 150
FEW_WORDS = 100
"""Vocabulary of models that read no text: no product that is compared has its size."""
QUERY_TOKENS = (3, 7, 13, 40)
DTYPES = [
    "float32",
    pytest.param(
        "bfloat16",
        marks=pytest.mark.skipif(
            not multiplies_natively(torch.bfloat16), reason="this processor does not multiply bfloat16 itself"
        ),
    ),
]


@pytest.fixture(scope="module")
def bundled() -> MixEncoder:
    return MixEncoder.from_pretrained()


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@cache
def engine_of(k: int, dtype: str, layers: int = 1, **changes: int) -> MixEncoder:
    """The bundled model's size with k context embeddings and random weights, over a backbone of few layers."""
    backbone = MixEncoderConfig.from_pretrained(default_checkpoint()).backbone_config.to_dict()
    backbone = {**backbone, "num_hidden_layers": layers, **changes}
    torch.manual_seed(k)
    config = MixEncoderConfig(
        backbone_config=backbone, num_context_embeddings=k, interaction_layers=(-1,), dual_term=True
    )
    return MixEncoder(MixEncoderModel(config).to(getattr(torch, dtype)), load_tokenizer(default_checkpoint()))


def rows_of(lengths: list[int]) -> list[list[int]]:
    """Token rows of random texts."""
    generator = torch.Generator().manual_seed(1)
    return [[101, *torch.randint(1000, 29000, (n - 2,), generator=generator).tolist(), 102] for n in lengths]


def random_queries(engine: MixEncoder, length: int, count: int = 1) -> QueryState:
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(engine.dtype)

    keys, values = (random(count, length, 12, 32) for _ in range(2))
    return QueryState((keys,), (values,), torch.full((count,), length), random(count, 384))


@pytest.mark.parametrize("dtype", DTYPES)
def test_texts_are_encoded_to_the_bits_that_they_have_alone(dtype, threads):
    engine = engine_of(2, dtype, layers=2)
    lengths = [*range(3, 26), 31, 32, 33, 40, 41, 56, 64, 65, 100, 128, 130]
    rows = rows_of(lengths)
    # again and again, so that passes of all sizes occur
    many = [row for row in rows for _ in range(3)] + rows_of([9] * 45 + [20] * 13 + [50] * 7)
    documents, queries = engine.encode_rows(many), engine._encode_queries(many, 32, False)
    backwards = engine.encode_rows(many[::-1], batch_size=5).flip(0)
    assert torch.equal(documents, backwards)
    for number, row in enumerate(rows):
        place = 3 * number + 1
        assert torch.equal(engine.encode_rows([row])[0], documents[place]), lengths[number]
        one, other = engine._encode_queries([row], 32, False), queries.select(place)
        assert torch.equal(one.keys[0], other.keys[0]), lengths[number]
        assert torch.equal(one.values[0], other.values[0]), lengths[number]
        assert torch.equal(one.pooled, other.pooled), lengths[number]


@pytest.mark.parametrize("k", [1, 3, 5, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_scored_to_the_same_bits_in_any_order_number_and_company(k, dtype, threads):
    engine = engine_of(k, dtype, vocab_size=FEW_WORDS)
    candidates = torch.randn(N, k, 384, generator=torch.Generator().manual_seed(2)).to(engine.dtype)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    for length in QUERY_TOKENS:
        query = random_queries(engine, length, count=2)
        scores = engine.interact(query, candidates)
        assert torch.equal(engine.interact(query, candidates[order]), scores[:, order]), length
        assert torch.equal(engine.interact(query, candidates[:77]), scores[:, :77]), length
        for place in (0, 31, 64, N - 1):
            alone = engine.interact(query.select(1), candidates[place : place + 1])
            assert torch.equal(alone[0], scores[1, place : place + 1]), (length, place)


INDEXED = [("float32", "native"), ("float16", "native"), ("float32", "int8")]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("precision", "products"), INDEXED)
def test_an_index_ranks_to_the_same_bits_in_any_order_number_and_company(k, precision, products, threads):
    engine = engine_of(k, "float32", vocab_size=FEW_WORDS)
    record_format = RecordFormat(engine.model, "projected", precision)
    context = torch.randn(700, k, 384, generator=torch.Generator().manual_seed(2))
    rows = record_format.encode(context)
    ranker = StreamRanker(engine.model, record_format, products=products)

    def scores(query: QueryState, places: Tensor) -> Tensor:
        found = ranker.rank(query, [(torch.arange(len(places)), {name: part[places] for name, part in rows.items()})])
        return torch.empty_like(found.scores).scatter_(1, found.ids, found.scores)

    everything = torch.arange(700)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(3))
    stored = record_format.encode(context[order])
    assert all(torch.equal(part[order], stored[name]) for name, part in rows.items())
    for length in (5, 16):
        query = random_queries(engine, length, count=2)
        whole = scores(query, everything)
        assert torch.equal(scores(query, order), whole[:, order]), length
        assert torch.equal(scores(query, everything[:190]), whole[:, :190]), length
        for place in (0, 31, 511, 512, 699):
            assert torch.equal(scores(query.select(1), everything[place : place + 1])[0, 0], whole[1, place]), length


def test_texts_are_ranked_and_paired_to_the_same_bits(bundled, threads):
    documents = [
        " ".join(["water", "boils", "when", "it", "is", "hot", "enough"][: 1 + n % 7]) * (1 + n) for n in range(20)
    ]
    query = "when does water boil?"
    scores = {entry["corpus_id"]: entry["score"] for entry in bundled.rank(query, documents)}
    backwards = {19 - entry["corpus_id"]: entry["score"] for entry in bundled.rank(query, documents[::-1])}
    assert backwards == scores
    company = bundled.rank(["why?", query, "where is the river, and how deep?"], documents)[1]
    assert {entry["corpus_id"]: entry["score"] for entry in company} == scores
    predicted = bundled.predict([(query, document) for document in documents])
    assert predicted.tolist() == [scores[place] for place in range(20)]
    alone = [float(bundled.predict((query, document))) for document in documents[::3]]
    assert alone == predicted.tolist()[::3]
