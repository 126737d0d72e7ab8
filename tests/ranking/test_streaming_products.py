"""Ranking in other ways than a CPU's own: int8 and bfloat16 products, and the pieces of a GPU."""

import pytest
import torch

from mixencoder.errors import InputError
from mixencoder.modeling import QueryState
from mixencoder.ranking import interaction
from mixencoder.ranking.interaction import prepare_layers
from mixencoder.ranking.piece_sizes import PieceSize
from mixencoder.ranking.plan import Plan
from mixencoder.ranking.record_format import LAYOUTS, RecordFormat
from mixencoder.ranking.streaming import StreamRanker
from tests.ranking.streaming_cases import FORMS, chunks, contexts, dense, make_model, queries


def test_int8_products_move_scores_by_what_seven_bits_allow():
    model = make_model({"dual_term": True}, intermediate_size=96)
    query_state, context = queries(model), contexts(model)
    record_format = RecordFormat(model, "projected", "float32")
    rows = record_format.encode(context)
    want, got = (
        dense(StreamRanker(model, record_format, products=products).rank(query_state, chunks(rows)))
        for products in ("native", "int8")
    )
    # noise of half a step, uniform, in activations and weights alike
    noisy = make_model({"dual_term": True}, intermediate_size=96)
    generator = torch.Generator().manual_seed(4)
    layer = noisy.interaction[0]
    with torch.no_grad():
        for linear in (layer.attention_output, noisy.gate, layer.intermediate, layer.output):
            step = linear.weight.abs().amax(dim=1, keepdim=True) / 63
            linear.weight += (torch.rand(linear.weight.shape, generator=generator) - 0.5) * step * 2
    budget = dense(StreamRanker(noisy, record_format).rank(query_state, chunks(rows))) - want
    assert 0 < (got - want).pow(2).mean().sqrt() < budget.pow(2).mean().sqrt()


@pytest.mark.parametrize("options", FORMS[:2])
def test_bfloat16_products_move_scores_by_what_its_eight_bits_allow(options, monkeypatch):
    """Emulated here, where a processor may not have them."""
    model = make_model(options)
    query_state, context = queries(model), contexts(model)
    record_format = RecordFormat(model, "projected", "float16")
    rows = record_format.encode(context)
    monkeypatch.setattr(interaction, "multiplies_natively", lambda dtype, device: True)
    want, got = (
        dense(StreamRanker(model, record_format, products=products).rank(query_state, chunks(rows)))
        for products in ("native", "bfloat16")
    )
    # what the whole model in bfloat16 makes of the same embeddings
    narrow = make_model(options, torch.bfloat16)
    state = QueryState(
        *(tuple(part.bfloat16() for part in parts) for parts in (query_state.keys, query_state.values)),
        query_state.lengths,
        query_state.pooled,
    )
    with torch.inference_mode():
        budget = narrow.interact(state, context.bfloat16()).full.float() - want
    assert 0 < (got - want).pow(2).mean().sqrt() < budget.pow(2).mean().sqrt()


@pytest.mark.parametrize("faster", [True, False])
def test_auto_takes_bfloat16_products_where_they_are_faster(monkeypatch, faster):
    monkeypatch.setattr(interaction, "multiplies_faster", lambda dtype, device: faster)
    monkeypatch.setattr(interaction, "multiplies_natively", lambda dtype, device: True)
    model = make_model({})
    query_state, context = queries(model), contexts(model)
    record_format = RecordFormat(model)
    rows = record_format.encode(context)
    found, want = (
        dense(StreamRanker(model, record_format, products=products).rank(query_state, chunks(rows)))
        for products in ("auto", "bfloat16" if faster else "native")
    )
    assert torch.equal(found, want)
    wide = make_model({}, torch.float64)
    assert prepare_layers(wide, "auto").dtype == torch.float64


def test_bfloat16_products_refuse_a_processor_that_would_emulate_them(monkeypatch):
    model = make_model({})
    monkeypatch.setattr(interaction, "multiplies_natively", lambda dtype, device: dtype == torch.float32)
    with pytest.raises(InputError, match=r'products "bfloat16" cannot run here.*"int8".* on any CPU'):
        StreamRanker(model, RecordFormat(model), products="bfloat16")
    # nor is a model in bfloat16 multiplied in it
    assert prepare_layers(make_model({}, torch.bfloat16)).dtype == torch.float32


def test_int8_products_refuse_what_they_do_not_know():
    with pytest.raises(InputError, match=r'products "int8" cannot run in torch.float64 on cpu'):
        StreamRanker(make_model({}, torch.float64), RecordFormat(make_model({})), products="int8")
    model = make_model({}, hidden_act="tanh")
    with pytest.raises(InputError, match='products "int8" do not support the activation Tanh'):
        StreamRanker(model, RecordFormat(model), products="int8")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", FORMS)
def test_pieces_of_a_gpu_give_the_scores_of_a_cpu(options, layout, monkeypatch):
    """Queries padded to a few lengths, rows by way of a staging area: all but the recording itself runs on a CPU."""
    model = make_model(options)
    # lengths on both sides of those that queries are padded to
    query_state, context = queries(model, (1, 15, 16, 17, 33)), contexts(model, 700)
    record_format = RecordFormat(model, layout, "int8")
    rows = record_format.encode(context)
    want = StreamRanker(model, record_format)
    monkeypatch.setattr(interaction, "FusedLayers", interaction.OperatorLayers)
    plan = Plan(256, 64, replayed=True, staged=True)
    ranker = StreamRanker(model, record_format, plan=plan)
    for score in ("full", "interaction", *(["dual"] if options.get("dual_term") else [])):
        got = dense(ranker.rank(query_state, chunks(rows, size=300), score=score), 700)
        torch.testing.assert_close(
            got, dense(want.rank(query_state, chunks(rows), score=score), 700), rtol=1e-4, atol=1e-4
        )
        # a place that held another query before is as good as a fresh one
        for number in (4, 0, 2):
            used, fresh = (
                each.rank(query_state.select(number), chunks(rows, size=300), score=score)
                for each in (ranker, StreamRanker(model, record_format, plan=plan))
            )
            assert torch.equal(used.ids, fresh.ids)
            assert torch.equal(used.scores, fresh.scores)


def test_replays_use_few_lengths_and_shapes(monkeypatch):
    model = make_model(FORMS[1])
    monkeypatch.setattr(interaction, "FusedLayers", interaction.OperatorLayers)
    recorded = set()

    def call(self, key, function):
        recorded.add(key)
        return function()

    monkeypatch.setattr("mixencoder.ranking.cuda_graphs.CudaGraphs.call", call)
    record_format = RecordFormat(model)
    rows = record_format.encode(contexts(model, 700))
    ranker = StreamRanker(model, record_format, plan=Plan(256, 64, replayed=True, staged=False))
    # whatever this processor's trials would find
    monkeypatch.setattr(ranker._sizes, "for_width", lambda width: tuple(map(PieceSize, (256, 128, 64))))
    ranker.rank(queries(model, range(1, 34)), chunks(rows))
    first = {key for key in recorded if key[0] == 0}
    assert first == {(0, size, "full", length) for size in (256, 192 + 64) for length in (16, 32, 64)}
    ranker.rank(queries(model, (5,)), chunks({name: tensor[:100] for name, tensor in rows.items()}))
    assert {key for key in recorded if key[0] == 0} - first == {(0, 128, "full", 16)}
