"""Encoders prepared for inference: equal to the backbone, used only where they may be, never with old weights."""

import copy
import threading

import pytest
import torch
from torch import nn

from mixencoder import MixEncoder, MixEncoderConfig, MixEncoderModel
from mixencoder.base.backbones import SUPPORTED, KeyValueTap, LastTapReached, build_backbone, encoder_layers
from mixencoder.base.inference_context import inference_context
from mixencoder.base.linears import can_pack
from mixencoder.base.prepared_encoder import PreparedEncoder, prepare
from mixencoder.base.tokenization import pad
from mixencoder.peers import CrossEncoder
from tests.conftest import backbone_config

ROWS = [[2, 5, 6, 8, 9, 10, 3], [2, 7, 3]]
NOT_BUILT_AS_BERT = ("albert", "modernbert")
NATIVE_BFLOAT16 = can_pack(torch.bfloat16, torch.device("cpu"))
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not NATIVE_BFLOAT16, reason="this processor does not multiply bfloat16 natively"),
    ),
]


def make_backbone(kind: str = "bert", dtype: torch.dtype = torch.float32, **changes: object):
    torch.manual_seed(0)
    return build_backbone(backbone_config(kind, initializer_range=0.3, **changes)).eval().to(dtype)


@pytest.fixture
def model(backbone_path) -> MixEncoder:
    return MixEncoder.from_backbone(backbone_path)


def used(model: MixEncoder) -> bool:
    """Whether a call of the engine would use a prepared encoder."""
    with inference_context(model.model):
        return model.model.prepared_encoder() is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind in SUPPORTED if kind not in NOT_BUILT_AS_BERT])
@torch.inference_mode()
def test_it_computes_what_the_backbone_does(kind, dtype):
    backbone = make_backbone(kind, dtype)
    prepared = prepare(backbone)
    assert isinstance(prepared, PreparedEncoder)
    ids, mask = pad(ROWS, 0)
    for given in (mask, None):
        taps = [KeyValueTap(range(3), stop_after_last=False) for _ in range(3)]
        want = backbone(input_ids=ids, attention_mask=given, key_value_tap=taps[0]).last_hidden_state
        got = prepared(ids, given, taps[1])
        exact = backbone.double()(input_ids=ids, attention_mask=given, key_value_tap=taps[2]).last_hidden_state
        backbone.to(dtype)
        valid = torch.ones_like(mask).bool() if given is None else mask.bool()
        found = [(want, got, exact), *(tuple(tap[n][part] for tap in taps) for n in range(3) for part in range(2))]
        for plain, fast, wanted in found:
            assert fast.shape == plain.shape
            assert fast.dtype == dtype
            # as far from the exact result as the backbone is, but for rounding
            budget, error = ((part.double() - wanted)[valid].square().mean().sqrt() for part in (plain, fast))
            assert error <= 1.5 * budget + 1e-6


@pytest.mark.parametrize("kind", NOT_BUILT_AS_BERT)
def test_other_layers_are_not_prepared(kind):
    assert prepare(make_backbone(kind)) is None


def test_a_layer_that_is_not_as_bert_s_is_not_prepared():
    class Adapted(nn.Linear):
        """As a library for adapters replaces a linear layer."""

    for changed in ("subclass", "no bias", "dtype", "chunks", "attention"):
        backbone = make_backbone(chunk_size_feed_forward=2) if changed == "chunks" else make_backbone()
        linear = encoder_layers(backbone)[1].intermediate
        if changed == "subclass":
            linear.dense.__class__ = Adapted
        elif changed == "no bias":
            linear.dense.bias = None
        elif changed == "dtype":
            linear.dense.double()
        elif changed == "attention":
            backbone.set_attn_implementation("eager")
        assert prepare(backbone) is None, changed
    assert prepare(make_backbone()) is not None


def test_token_types_reach_the_embeddings():
    backbone = make_backbone()
    ids, mask = pad(ROWS, 0)
    with torch.inference_mode():
        prepared = prepare(backbone)
        found = [prepared(ids, mask, None, token_type_ids=torch.full_like(ids, kind)) for kind in (0, 1)]
        want = [
            backbone(input_ids=ids, attention_mask=mask, token_type_ids=torch.full_like(ids, kind)).last_hidden_state
            for kind in (0, 1)
        ]
    assert not torch.equal(*found)
    for got, wanted in zip(found, want, strict=True):
        torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()])


def test_the_pass_stops_after_the_last_tap():
    prepared, (ids, mask) = prepare(make_backbone()), pad(ROWS, 0)
    ran = []
    inner = prepared._layers[2].intermediate
    prepared._layers[2].intermediate = lambda rows: ran.append(rows) or inner(rows)
    with torch.inference_mode(), pytest.raises(LastTapReached):
        prepared(ids, mask, KeyValueTap([1, 2], stop_after_last=True))
    assert not ran


def test_kept_keys_and_values_do_not_keep_other_memory():
    prepared, (ids, mask) = prepare(make_backbone()), pad(ROWS, 0)
    tap = KeyValueTap([2], stop_after_last=False)
    with torch.inference_mode():
        prepared(ids, mask, tap)
    for part in tap[2]:
        assert part.untyped_storage().nbytes() == part.nbytes


def test_engines_use_it_in_their_calls_alone(model):
    assert model.model.prepared_encoder() is None
    assert used(model)
    with torch.inference_mode():
        assert model.model.prepared_encoder() is None, "outside of a call nothing says whether the weights changed"
    model.encode_query("alpha beta")
    with torch.inference_mode():
        assert model.model.prepared_encoder() is None


def test_the_module_itself_and_training_run_the_backbone(model, monkeypatch):
    calls = []
    monkeypatch.setattr(PreparedEncoder, "__call__", lambda *args, **kwargs: calls.append(1))
    ids, mask = pad(ROWS, 0)
    model.model.encode_document(ids, mask)
    with torch.inference_mode():
        model.model.encode_document(ids, mask)
    assert not calls


@pytest.mark.parametrize("how", ["in place", "data", "load_state_dict", "other parameter", "half"])
def test_changed_weights_are_used_from_the_next_call_on(model, how):
    """Also where nothing but a linear layer of the encoder changes."""
    text = "alpha beta gamma"
    before = model.encode_document([text])
    linear = encoder_layers(model.model.backbone)[1].intermediate.dense
    if how == "in place":
        with torch.no_grad():
            linear.weight.mul_(1.5)
    elif how == "data":
        linear.weight.data *= 1.5
    elif how == "load_state_dict":
        linear.load_state_dict({name: 1.5 * tensor for name, tensor in linear.state_dict().items()})
    elif how == "other parameter":
        linear.weight = nn.Parameter(1.5 * linear.weight.detach())
    else:
        model.model.bfloat16()
    after = model.encode_document([text])
    assert not torch.equal(before.float(), after.float())
    ids = model.read_document([text])
    with torch.no_grad():
        want = model.model.eval().encode_document(*pad(ids, 0))
    torch.testing.assert_close(after, want, rtol=0.05 if how == "half" else 1e-4, atol=0.05 if how == "half" else 1e-5)


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "global hook"])
def test_what_someone_hooked_into_the_encoder_runs(model, how, monkeypatch):
    seen = []
    layer = encoder_layers(model.model.backbone)[1]
    if how == "hook":
        handle = layer.intermediate.register_forward_hook(lambda *args: seen.append(1))
    elif how == "pre-hook":
        handle = layer.register_forward_pre_hook(lambda *args: seen.append(1))
    elif how == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(1))
    else:
        inner = layer.intermediate.forward
        monkeypatch.setattr(layer.intermediate, "forward", lambda rows: seen.append(1) or inner(rows), raising=False)
    with_it = model.encode_document(["alpha beta"])
    assert seen
    if how == "forward":
        monkeypatch.undo()
    else:
        handle.remove()
    if how != "forward":
        assert used(model)
        torch.testing.assert_close(model.encode_document(["alpha beta"]), with_it)


def test_an_encoder_that_is_not_prepared_gives_texts_the_bits_that_they_have_alone_too(model):
    """The trials of passes follow what runs."""
    texts = ["alpha beta gamma", "delta", "alpha " * 20, "beta gamma delta alpha beta"] * 5
    for hooked in (False, True):
        if hooked:
            model.model.backbone.register_forward_hook(lambda *args: None)
        assert used(model) == (not hooked)
        together = model.encode_document(texts)
        assert all(torch.equal(together[n], model.encode_document([text])[0]) for n, text in enumerate(texts))


def test_copies_and_threads_have_their_own(model):
    want = model.encode_document(["alpha beta"])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        encoder_layers(twin.model.backbone)[0].output.dense.weight.zero_()
    assert not torch.equal(twin.encode_document(["alpha beta"]), want)
    assert torch.equal(model.encode_document(["alpha beta"]), want)
    found = []
    threads = [
        threading.Thread(target=lambda engine=engine: found.append((engine, engine.encode_document(["alpha beta"]))))
        for engine in (model, twin) * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got, want) == (engine is model) for engine, got in found)


def test_a_cross_encoder_uses_it_too(backbone_path):
    engine = CrossEncoder.from_backbone(backbone_path)
    got = engine.predict([("alpha", "beta gamma"), ("delta", "alpha")])
    engine.model.backbone.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(engine.predict([("alpha", "beta gamma"), ("delta", "alpha")]), got)


def test_a_model_with_an_early_stop_reads_queries_alike():
    torch.manual_seed(0)
    config = MixEncoderConfig(backbone_config=backbone_config(), dual_term=False, interaction_layers=[1])
    net, (ids, mask) = MixEncoderModel(config).eval(), pad(ROWS, 0)
    want = net.read_query(ids, mask)
    with inference_context(net):
        assert net.prepared_encoder() is not None
        got = net.read_query(ids, mask)
    torch.testing.assert_close(got.keys, want.keys)
    torch.testing.assert_close(got.values, want.values)
