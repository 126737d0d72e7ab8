"""Weights that change are noticed whichever way they change, and what was computed from them is not used again."""

import copy
import pickle
import time

import pytest
import torch

from mixencoder import IndexMismatchError, MixEncoder
from mixencoder.base.weights_version import SAMPLED, WHOLE, KeptForWeights, weights_version
from mixencoder.ranking.identity import ModelIdentity
from mixencoder.ranking.query_cache import QueryStateCache
from tests.ranking.streaming_cases import FORMS, make_model

TEXTS = ["boil the rice in a pot", "undo the commit", "paris is the capital of france"]


def scale_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(0.9)


def scale_as_numpy(model):
    for parameter in model.parameters():
        array = parameter.detach().numpy()
        array *= 0.9


def put_other_data(model):
    parameter = next(model.parameters())
    parameter.data = parameter.data * 2


def put_another_parameter(model):
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.LayerNorm))
    norm.weight = torch.nn.Parameter(norm.weight * 2)


def shift_a_bias_of_data(model):
    next(p for name, p in model.named_parameters() if name.endswith("bias")).data[7] += 1


def turn_a_sign_of_zero(model):
    model.interaction[0].attention_output.bias.data.zero_().neg_()


def load_halves(model):
    model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items()})


def step(model):
    with torch.no_grad():
        model.backbone.embeddings.word_embeddings.weight[3, 5] += 1


def change_a_buffer(model):
    model.backbone.embeddings.token_type_ids.data.add_(1)


CHANGES = [
    scale_data,
    scale_as_numpy,
    put_other_data,
    put_another_parameter,
    shift_a_bias_of_data,
    turn_a_sign_of_zero,
    load_halves,
    step,
    change_a_buffer,
    lambda model: model.to(torch.float64),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_gives_another_version_and_looking_again_does_not(change):
    model = make_model(FORMS[1])
    before = weights_version(model)
    assert weights_version(model) == before
    change(model)
    after = weights_version(model)
    assert after != before
    assert weights_version(model) == after


def test_two_models_never_share_a_version():
    model = make_model({})
    assert weights_version(model) != weights_version(copy.deepcopy(model))


@pytest.mark.parametrize("transposed", [False, True])
def test_of_a_large_weight_every_slab_is_looked_at(transposed):
    side = 2 * int(WHOLE**0.5)
    layer = torch.nn.Linear(side, side, bias=False)
    if transposed:
        layer.weight.data = layer.weight.data.T
    seen = {weights_version(layer)}
    rows = -(-side // SAMPLED) + 1
    memory = layer.weight.data.T if transposed else layer.weight.data
    for start in range(0, side, rows):
        memory[start : start + rows] += 1
        seen.add(weights_version(layer))
    assert len(seen) == 1 + len(range(0, side, rows))


def test_looking_takes_a_small_part_of_a_pass_over_all_weights():
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(16)))

    def fastest(work):
        times = []
        for _ in range(20):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    # 64 MB of weights: a look that read them all could not be ten times as fast as their sum
    assert fastest(lambda: weights_version(model)) < fastest(lambda: [p.sum() for p in model.parameters()]) / 10


@pytest.mark.parametrize("change", [scale_data, scale_as_numpy, load_halves], ids=lambda change: change.__name__)
def test_an_index_of_weights_that_changed_is_refused_and_a_new_one_agrees(checkpoint, change):
    engine = MixEncoder.from_pretrained(checkpoint)
    index = engine.index(TEXTS, precision="float32")
    # fills the cache of queries and what the ranker prepared
    engine.rank("how to cook rice", index)
    change(engine.model)
    with pytest.raises(IndexMismatchError, match="encoder"):
        engine.rank("how to cook rice", index)
    fresh = engine.rank("how to cook rice", engine.index(TEXTS, precision="float32"))
    direct = engine.rank("how to cook rice", TEXTS)
    assert [hit["corpus_id"] for hit in fresh] == [hit["corpus_id"] for hit in direct]
    assert [hit["score"] for hit in fresh] == pytest.approx([hit["score"] for hit in direct], rel=1e-4, abs=1e-4)


def test_a_kept_value_is_computed_once_for_a_version():
    kept, computed = KeptForWeights(), []

    def compute():
        computed.append(len(computed))
        return computed[-1]

    assert [kept.get(version, compute) for version in (1, 1, 2, 2, 1)] == [0, 0, 1, 1, 2]
    assert kept.put(3, "given") == kept.get(3, compute) == "given"
    for copied in (copy.copy(kept), copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert copied.get(3, lambda: "computed") == "computed"
    assert kept.get(3, compute) == "given"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_identities_and_caches_are_copied_without_what_they_remember(copied, tokenizer):
    model = make_model(FORMS[1])
    identity, cache = ModelIdentity(model, tokenizer), QueryStateCache(max_bytes=12345)
    names = ("weights", "encoder", "projection", "tokenizer")
    parts = identity.parts(names)
    ids = torch.tensor([[2, 5, 3]])
    cache.fetch(model, [[2, 5, 3]], lambda rows: model.encode_query(ids, torch.ones_like(ids)))
    other, empty = copied(identity), copied(cache)
    assert other.parts(names) == parts
    assert (empty.max_bytes, empty.nbytes) == (12345, 0)
    assert cache.nbytes > 0
    empty.fetch(model, [[2, 5, 3]], lambda rows: model.encode_query(ids, torch.ones_like(ids)))
    assert empty.nbytes > 0
    # what was remembered is that of other weights
    scale_data(other._model)
    changed = other.remembered_parts(weights_version(other._model), names)
    assert [name for name in names if changed[name] != parts[name]] == ["weights", "encoder", "projection"]
