"""Ranking from streamed records: the model's own scores, the same bits however they stream, and exact top-k."""

import threading
from functools import partial

import pytest
import torch

from benchmarks.measuring.timing import peak_bytes
from mixencoder.errors import InputError, NonFiniteError
from mixencoder.ranking import interaction, piece_sizes
from mixencoder.ranking.candidate_buffer import CandidateBuffer
from mixencoder.ranking.piece_sizes import PieceSize
from mixencoder.ranking.record_format import LAYOUTS, RecordFormat
from mixencoder.ranking.streaming import RowSource, StreamRanker
from tests.ranking.streaming_cases import (
    FORMS,
    N,
    chunks,
    contexts,
    dense,
    exact_scores,
    make_model,
    queries,
    ratio_of_errors,
)


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("score", ["full", "interaction", "dual"])
def test_float32_records_give_the_models_scores_to_float_rounding(options, layout, score):
    if score == "dual" and not options.get("dual_term"):
        pytest.skip("no dual term")
    model = make_model(options)
    query_state, context = queries(model), contexts(model)
    with torch.inference_mode():
        plain = getattr(model.interact(query_state, context), score)
    want = exact_scores(model, query_state, context, score)
    record_format = RecordFormat(model, layout, "float32")
    ranking = StreamRanker(model, record_format).rank(query_state, chunks(record_format.encode(context)), score=score)
    # twice the error of the plain expressions, as everywhere in this project
    assert ratio_of_errors(dense(ranking), want, plain) < 2


@pytest.mark.parametrize("options", FORMS[:2])
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
def test_compact_records_in_low_precision_score_as_their_rounded_embeddings_do(options, precision):
    model = make_model(options)
    query_state, context = queries(model), contexts(model)
    record_format = RecordFormat(model, "compact", precision)
    rows = record_format.encode(context)
    rounded = torch.empty_like(context)
    record_format.read(rows, 0, N, {"context": rounded}, 0)
    assert 0 < (rounded - context).abs().max() < 0.05
    with torch.inference_mode():
        plain = model.interact(query_state, rounded).full
    want = exact_scores(model, query_state, rounded)
    assert ratio_of_errors(dense(StreamRanker(model, record_format).rank(query_state, chunks(rows))), want, plain) < 2


@pytest.mark.parametrize("options", FORMS[:2])
@pytest.mark.parametrize(("precision", "unit"), [("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_projected_records_in_low_precision_are_as_near_as_equal_noise_in_every_part(options, precision, unit):
    model = make_model(options)
    query_state, context = queries(model), contexts(model)
    exact, record_format = (RecordFormat(model, "projected", name) for name in ("float32", precision))
    rows = exact.encode(context)
    want = dense(StreamRanker(model, exact).rank(query_state, chunks(rows)))
    got = dense(StreamRanker(model, record_format).rank(query_state, chunks(record_format.encode(context))))
    generator = torch.Generator().manual_seed(3)
    noisy = {
        name: part + (torch.rand(part.shape, generator=generator) - 0.5) * 2 * unit * part.abs().amax(-1, keepdim=True)
        for name, part in rows.items()
    }
    budget = dense(StreamRanker(model, exact).rank(query_state, chunks(noisy))) - want
    assert 0 < (got - want).pow(2).mean().sqrt() <= budget.pow(2).mean().sqrt()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("options", "precision", "products"),
    [
        (FORMS[0], "float32", "native"),
        (FORMS[1], "int8", "native"),
        (FORMS[2], "float16", "native"),
        (FORMS[4], "float32", "native"),
        (FORMS[5], "bfloat16", "native"),
        (FORMS[3], "float16", "int8"),
    ],
)
def test_a_score_has_the_same_bits_whatever_streams_beside_it(options, precision, products, layout, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = make_model(options, intermediate_size=96)
        # lengths on both sides of those at which products change their kernels
        query_state, context = queries(model, (3, 4, 7, 9, 17, 33)), contexts(model)
        record_format = RecordFormat(model, layout, precision)
        rows = record_format.encode(context)
        ranker = StreamRanker(model, record_format, products=products)
        crowd = dense(ranker.rank(query_state, chunks(rows)))
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        shuffled = {name: tensor[order] for name, tensor in rows.items()}
        for size in (1, 37, 512, 2000):
            for number in range(3):
                got = ranker.rank(query_state.select(number), chunks(shuffled, order, size))
                assert torch.equal(dense(got)[0], crowd[number])
        for count in (1, 10, 31, 33, 100, 300, 513):
            part = order[:count]
            got = ranker.rank(query_state, chunks({name: tensor[part] for name, tensor in rows.items()}, part, 200))
            assert torch.equal(got.scores.sort().values, crowd[:, part].sort().values)
            assert torch.equal(crowd.gather(1, got.ids), got.scores)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", FORMS)
def test_where_a_full_piece_gives_a_candidate_other_bits_elsewhere_pieces_come_in_twelves(options, monkeypatch):
    model = make_model(options)
    query_state, context = queries(model), contexts(model)
    record_format = RecordFormat(model, "compact", "float32")
    rows, sizes = record_format.encode(context), []
    want = dense(StreamRanker(model, record_format).rank(query_state, chunks(rows)))
    holds = {384: True, 512: False, 256: False}
    monkeypatch.setattr(piece_sizes, "keeps_bits", lambda buffer, query, size: holds[size])
    piece_scores = CandidateBuffer._piece_scores

    def spied(buffer, queries, rows, score):
        sizes.append(rows.stop - rows.start)
        return piece_scores(buffer, queries, rows, score)

    monkeypatch.setattr(CandidateBuffer, "_piece_scores", spied)
    got = dense(StreamRanker(model, record_format).rank(query_state, chunks(rows)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert sizes[:2] == [384, 384]
    assert N <= sum(sizes) <= N + 384


def test_queries_that_no_size_suits_together_are_scored_in_sizes_of_their_own(monkeypatch):
    model = make_model(FORMS[1])
    # 4 and 9 tokens take products of two widths
    query_state, context = queries(model, (4, 9, 4)), contexts(model)
    record_format = RecordFormat(model, "compact", "float32")
    rows, used = record_format.encode(context), set()
    want = dense(StreamRanker(model, record_format).rank(query_state, chunks(rows)))
    ranker = StreamRanker(model, record_format)
    widths = [ranker._layers.width(length) for length in (4, 9)]
    sizes = {width: tuple(map(PieceSize, of)) for width, of in zip(widths, [(512, 64), (384, 48)], strict=True)}
    monkeypatch.setattr(ranker._sizes, "for_width", sizes.__getitem__)
    piece_scores = CandidateBuffer._piece_scores

    def spied(buffer, queries, rows, score):
        used.add((tuple(query.length for query in queries), rows.stop - rows.start))
        return piece_scores(buffer, queries, rows, score)

    monkeypatch.setattr(CandidateBuffer, "_piece_scores", spied)
    torch.testing.assert_close(dense(ranker.rank(query_state, chunks(rows))), want, rtol=1e-4, atol=1e-4)
    # one large piece costs less than several small ones
    assert used == {((4, 4), 512), ((9,), 384)}


@pytest.mark.parametrize(
    ("count", "expected"),
    [(10, [32]), (33, [64]), (100, [128]), (600, [512, 128]), (700, [512, 256]), (1000, [512, 512]), (512, [512])],
)
def test_pieces_are_cut_so_that_padding_and_calls_cost_least(count, expected):
    model = make_model(FORMS[0])
    ranker = StreamRanker(model, RecordFormat(model, "compact", "float32"))
    sizes = tuple(map(PieceSize, (512, 256, 128, 64, 32)))
    assert [size.candidates for size in ranker._sizes.cut(count, sizes)] == expected


def test_sizes_that_keep_bits_on_one_thread_alone_run_on_one(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = make_model(FORMS[1])
        query_state, context = queries(model), contexts(model, 40)
        record_format = RecordFormat(model, "compact", "float32")
        rows, vectors = record_format.encode(context), CandidateBuffer.vectors

        def split_between_threads(buffer, query, count):
            # as a library that splits the sums of products of few rows
            out = vectors(buffer, query, count)
            return out * (1 + 1e-6) if count < 128 and torch.get_num_threads() > 1 else out

        monkeypatch.setattr(CandidateBuffer, "vectors", split_between_threads)
        ranker, used = StreamRanker(model, record_format), []
        piece_scores = CandidateBuffer._piece_scores

        def spied(buffer, queries, rows, score):
            used.append((rows.stop - rows.start, torch.get_num_threads()))
            return piece_scores(buffer, queries, rows, score)

        monkeypatch.setattr(CandidateBuffer, "_piece_scores", spied)
        ranker.rank(query_state, chunks(rows))
        assert used == [(64, 1)]
        assert {size.one_thread for size in ranker._sizes.for_width(7) if size.candidates >= 128} == {False}
        # a size for several queries must suit all of them in the same way
        two = PieceSize(64), PieceSize(64, one_thread=True)
        monkeypatch.setattr(ranker._sizes, "for_width", lambda width: (PieceSize(128), two[width > 8]))
        groups = ranker._sizes.for_queries([ranker._layers.query(queries(model, (m,)), 0) for m in (4, 20)])
        assert groups == [((PieceSize(128),), [0, 1])]
    finally:
        torch.set_num_threads(before)


def test_threads_that_rank_at_once_get_what_each_gets_alone():
    model = make_model(FORMS[1])
    query_state, context = queries(model), contexts(model)
    record_format = RecordFormat(model, "projected", "float16")
    rows, results = record_format.encode(context), {}
    ranker = StreamRanker(model, record_format)
    want = ranker.rank(query_state, chunks(rows), 20)

    def work(number):
        # a thread starts with the default number of threads
        torch.set_num_threads(want_threads)
        results[number] = [ranker.rank(query_state.select(number % 3), chunks(rows), 20) for _ in range(5)]

    want_threads = torch.get_num_threads()
    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number, rankings in results.items():
        for ranking in rankings:
            assert torch.equal(ranking.ids[0], want.ids[number % 3])
            assert torch.equal(ranking.scores[0], want.scores[number % 3])


@pytest.mark.parametrize("top_k", [1, 7, N, N + 5])
def test_the_top_k_are_the_first_of_the_whole_ranking_and_ties_go_to_the_lower_position(top_k):
    model = make_model(FORMS[1])
    query_state = queries(model)
    context = contexts(model, 60).repeat(19, 1, 1)[:N]
    record_format = RecordFormat(model, "projected", "float16")
    rows, ranker = record_format.encode(context), StreamRanker(model, record_format)
    whole = ranker.rank(query_state, chunks(rows))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = chunks({name: tensor[order] for name, tensor in rows.items()}, order)
    best = ranker.rank(query_state, shuffled, top_k)
    assert torch.equal(best.scores, whole.scores[:, :top_k])
    assert torch.equal(best.ids, whole.ids[:, :top_k])
    tied = whole.scores[:, 1:] == whole.scores[:, :-1]
    assert tied.float().mean() > 0.9
    assert (whole.ids[:, 1:] > whole.ids[:, :-1])[tied].all()
    assert (whole.scores[:, 1:] <= whole.scores[:, :-1]).all()


@pytest.mark.parametrize("top_k", [None, 10])
def test_a_document_of_several_rows_has_the_score_of_its_best(top_k):
    model = make_model(FORMS[1])
    query_state, context = queries(model), contexts(model)
    record_format = RecordFormat(model, "projected", "float16")
    rows, ranker = record_format.encode(context), StreamRanker(model, record_format)
    positions = torch.randint(0, 300, (N,), generator=torch.Generator().manual_seed(5))
    scores = dense(ranker.rank(query_state, chunks(rows)))
    got = ranker.rank(query_state, chunks(rows, positions, 64), top_k, repeats=True)
    for number in range(3):
        best = {p: scores[number, positions == p].max().item() for p in positions.unique().tolist()}
        want = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:top_k]
        assert list(zip(got.ids[number].tolist(), got.scores[number].tolist(), strict=True)) == want


def test_many_scores_are_merged_as_few_are(monkeypatch):
    model = make_model(FORMS[1])
    query_state, context = queries(model), contexts(model)
    record_format = RecordFormat(model, "compact", "float32")
    rows, ranker = record_format.encode(context), StreamRanker(model, record_format)
    positions = torch.arange(N) % 350
    want = [ranker.rank(query_state, chunks(rows, positions), k, repeats=True) for k in (None, 5)]
    monkeypatch.setattr("mixencoder.ranking.streaming._WAITING", 1)
    got = [ranker.rank(query_state, chunks(rows, positions), k, repeats=True) for k in (None, 5)]
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.scores, b.scores)


@pytest.mark.parametrize("prefilter", [None, 20])
def test_memory_does_not_grow_with_the_number_of_candidates(prefilter):
    model = make_model(FORMS[1])
    record_format, query_state = RecordFormat(model), queries(model)
    rows, ranker = record_format.encode(contexts(model, 512)), StreamRanker(model, record_format)

    class Many(RowSource):
        def __init__(self, pieces):
            self.pieces = pieces

        def __iter__(self):
            for number in range(self.pieces):
                yield torch.arange(512) + 512 * number, rows

        def select(self, positions):
            yield positions, {name: tensor[positions % 512] for name, tensor in rows.items()}

    ranker.rank(query_state, Many(1), 10, prefilter=prefilter)
    # enough for scores to be merged more than once
    few, many = (
        peak_bytes(partial(ranker.rank, query_state, Many(pieces), 10, prefilter=prefilter)) for pieces in (40, 120)
    )
    assert many == few


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prefilter_interacts_with_the_best_of_the_dual_score_alone(layout):
    model = make_model(FORMS[1])
    query_state, context = queries(model), contexts(model)
    record_format = RecordFormat(model, layout, "float16")
    rows, ranker = record_format.encode(context), StreamRanker(model, record_format)
    whole = ranker.rank(query_state, chunks(rows))
    for prefilter in (N, N + 1):
        got = ranker.rank(query_state, chunks(rows), prefilter=prefilter)
        assert torch.equal(got.ids, whole.ids)
        assert torch.equal(got.scores, whole.scores)
    first = ranker.rank(query_state, chunks(rows), 90, score="dual")
    got = ranker.rank(query_state, chunks(rows), 10, prefilter=90)
    for number in range(3):
        survives = torch.isin(whole.ids[number], first.ids[number])
        assert torch.equal(got.ids[number], whole.ids[number][survives][:10])
        assert torch.equal(got.scores[number], whole.scores[number][survives][:10])


def test_a_prefilter_keeps_all_rows_of_a_document():
    model = make_model(FORMS[1])
    query_state, context = queries(model), contexts(model)
    record_format = RecordFormat(model, "projected", "float32")
    rows, ranker = record_format.encode(context), StreamRanker(model, record_format)
    positions = torch.arange(N) % 200
    whole = ranker.rank(query_state, chunks(rows, positions), repeats=True)
    got = ranker.rank(query_state, chunks(rows, positions), prefilter=50, repeats=True)
    assert got.ids.shape == (3, 50)
    for number in range(3):
        kept = torch.isin(whole.ids[number], got.ids[number])
        assert torch.equal(whole.scores[number][kept], got.scores[number])


def test_no_candidates_give_an_empty_ranking():
    model = make_model(FORMS[1])
    record_format = RecordFormat(model)
    ranker, empty = StreamRanker(model, record_format), record_format.encode(contexts(model, 0))
    for source in ([], [(torch.empty(0, dtype=torch.int64), empty)]):
        for options in ({}, {"top_k": 3}, {"top_k": 3, "repeats": True}, {"prefilter": 2}):
            ranking = ranker.rank(queries(model), source, **options)
            assert ranking.scores.shape == ranking.ids.shape == (3, 0)


def test_a_source_may_use_its_memory_again_and_its_chunks_are_read_once():
    model = make_model(FORMS[0])
    record_format = RecordFormat(model, "projected", "float32")
    rows = record_format.encode(contexts(model))
    ranker, query_state = StreamRanker(model, record_format), queries(model)
    want = dense(ranker.rank(query_state, chunks(rows)))
    memory = {name: torch.empty_like(tensor[:100]) for name, tensor in rows.items()}

    def stream():
        for positions, part in chunks(rows, size=100):
            for name, tensor in part.items():
                memory[name][: len(tensor)] = tensor
            yield positions, {name: tensor[: len(positions)] for name, tensor in memory.items()}
            for tensor in memory.values():
                tensor.fill_(torch.nan)

    assert torch.equal(dense(ranker.rank(query_state, stream())), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", FORMS[:2])
def test_other_precisions_of_the_model(options, dtype):
    model = make_model(options, dtype)
    query_state, context = queries(model), contexts(model)
    record_format = RecordFormat(model, "projected", "float32" if dtype == torch.float64 else "bfloat16")
    ranking = StreamRanker(model, record_format).rank(query_state, chunks(record_format.encode(context)))
    want = exact_scores(model, query_state, context).float()
    assert ranking.scores.dtype == torch.float32
    with torch.inference_mode():
        plain = model.interact(query_state, context).full
    error = (dense(ranking) - want).pow(2).mean().sqrt()
    assert error < max(2 * (plain - want).pow(2).mean().sqrt(), 1e-5 * want.abs().max())


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("options", FORMS)
def test_the_operators_give_the_scores_of_the_fused_path(options, backend, monkeypatch):
    model = make_model(options)
    query_state, context = queries(model), contexts(model, 150)
    record_format = RecordFormat(model, "projected", "float32")
    rows = record_format.encode(context)
    fused = StreamRanker(model, record_format).rank(query_state, chunks(rows))
    monkeypatch.setattr(interaction, "FusedLayers", interaction.OperatorLayers)
    model.kernel_backend = backend
    operators = StreamRanker(model, record_format).rank(query_state, chunks(rows))
    torch.testing.assert_close(dense(operators, 150), dense(fused, 150), rtol=1e-4, atol=1e-4)


def test_any_activation_gives_the_models_scores():
    model = make_model({}, hidden_act="gelu_new")
    query_state, context = queries(model), contexts(model, 50)
    record_format = RecordFormat(model, "projected", "float32")
    ranking = StreamRanker(model, record_format).rank(query_state, chunks(record_format.encode(context)))
    with torch.inference_mode():
        want = model.interact(query_state, context).full
    torch.testing.assert_close(dense(ranking, 50), want, rtol=1e-4, atol=1e-4)


def test_scores_that_are_not_finite_are_an_error():
    model = make_model({})
    record_format = RecordFormat(model, "projected", "float32")
    rows = record_format.encode(contexts(model, 40))
    rows["gate"] = rows["gate"].clone().index_fill_(0, torch.tensor([3]), torch.nan)
    with pytest.raises(NonFiniteError, match="3 of 120 scores are not finite"):
        StreamRanker(model, record_format).rank(queries(model), chunks(rows))


def test_bad_arguments_are_named():
    model = make_model({})
    record_format = RecordFormat(model)
    ranker, query_state = StreamRanker(model, record_format), queries(model)
    rows = record_format.encode(contexts(model, 4))
    for options, words in (
        ({"score": "best"}, "score is 'best'; expected one of full"),
        ({"score": "dual"}, "no dual term"),
        ({"prefilter": 5}, "prefilter ranks by the dual score, but this model has no dual term"),
        ({"top_k": 0}, "top_k is 0; expected a positive integer"),
        ({"top_k": True}, "top_k is True"),
    ):
        with pytest.raises(InputError, match=words):
            ranker.rank(query_state, chunks(rows), **options)
    with pytest.raises(InputError, match="positions reach from -1 to 2"):
        ranker.rank(query_state, chunks(rows, torch.arange(-1, 3)))
    with pytest.raises(InputError, match="a chunk has 3 positions but rows"):
        ranker.rank(query_state, [(torch.arange(3), rows)])
    del rows["gate"]
    with pytest.raises(InputError, match="a chunk lacks gate; expected the fields context"):
        ranker.rank(query_state, [(torch.arange(4), rows)])
    with pytest.raises(InputError, match="products is 'int4'; expected one of native, auto, bfloat16, int8"):
        StreamRanker(model, record_format, products="int4")
    dual = make_model(FORMS[1])
    with pytest.raises(InputError, match="candidates is an iterator"):
        StreamRanker(dual, RecordFormat(dual)).rank(queries(dual), iter([]), prefilter=3)
