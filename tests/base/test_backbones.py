"""Taps: keys and values as computed by hand, the early stop, threads, and encoders that are refused."""

import threading

import pytest
import torch
from transformers import (
    AlbertConfig,
    CamembertConfig,
    DebertaConfig,
    DebertaV2Config,
    GPT2Config,
    MPNetConfig,
    PreTrainedConfig,
)

from mixencoder import MixEncoderConfig, MixEncoderModel
from mixencoder.base.backbones import (
    SUPPORTED,
    KeyValueTap,
    LastTapReached,
    build_backbone,
    encoder_layers,
    layout_of,
    max_positions,
)
from mixencoder.base.tokenization import pad
from mixencoder.errors import UnsupportedBackboneError
from tests.conftest import backbone_config

ROWS = [[2, 5, 6, 8, 9, 10, 3], [2, 7, 3]]

KEY_AND_VALUE = {
    "electra": "attention.self.key attention.self.value",
    "bert": "attention.self.key attention.self.value",
    "roberta": "attention.self.key attention.self.value",
    "xlm-roberta": "attention.self.key attention.self.value",
    "distilbert": "attention.k_lin attention.v_lin",
    "albert": "attention.key attention.value",
}
FEED_FORWARD = {"distilbert": "ffn", "albert": "ffn", "modernbert": "mlp"}


def layers_of(backbone):
    """Return the distinct layer modules, in the order in which they first run."""
    if backbone.config.model_type == "albert":
        return [group.albert_layers[0] for group in backbone.encoder.albert_layer_groups]
    return {"distilbert": lambda: backbone.transformer.layer, "modernbert": lambda: backbone.layers}.get(
        backbone.config.model_type, lambda: backbone.encoder.layer
    )()


def run(backbone, layers, rows, *, stop=False):
    tap = KeyValueTap(layers, stop_after_last=stop)
    ids, mask = pad(rows, 0)
    backbone(input_ids=ids, attention_mask=mask, key_value_tap=tap)
    return tap


def keys_and_values_by_hand(kind, number, layer, x):
    """Compute keys and values (B, m, H, D) from a layer's input x (B, m, d)."""
    if kind != "modernbert":
        return [layer.get_submodule(path)(x).unflatten(-1, (2, 16)) for path in KEY_AND_VALUE[kind].split()]
    _, key, value = layer.attn.Wqkv(layer.attn_norm(x)).unflatten(-1, (3, 2, 16)).unbind(2)
    theta = 10_000.0 if number % 3 else 160_000.0
    # (m, 1, D / 2): coordinates i and i + D/2 of every attention head are rotated as a pair
    angles = torch.arange(x.shape[1]).view(-1, 1, 1) / theta ** (torch.arange(8) / 8)
    one, two = key.split(8, dim=-1)
    rotated = [one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()]
    return [torch.cat(rotated, dim=-1), value]


@pytest.mark.parametrize("kind", SUPPORTED)
def test_tapped_keys_and_values_equal_those_computed_by_hand(kind):
    torch.manual_seed(0)
    backbone = build_backbone(backbone_config(kind, initializer_range=0.3)).eval()
    # every layer's input and the layer, in the order of the calls; ALBERT's first two layers are one module
    calls = []
    for module in layers_of(backbone):
        module.register_forward_pre_hook(lambda layer, inputs: calls.append((layer, inputs[0])))
    with torch.no_grad():
        tap = run(backbone, [0, 1, 2], ROWS)
        assert len(calls) == 3
        for number, (layer, x) in enumerate(calls):
            assert layer is encoder_layers(backbone)[number]
            key, value = keys_and_values_by_hand(kind, number, layer, x)
            assert torch.equal(tap[number][1], value)
            if kind == "modernbert":
                torch.testing.assert_close(tap[number][0], key, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(tap[number][0], key)
    assert not torch.allclose(tap[0][0], tap[1][0])


def test_modernbert_keys_at_position_0_are_not_rotated():
    # candidates have position 0, so their queries need no rotation
    torch.manual_seed(0)
    backbone = build_backbone(backbone_config("modernbert")).eval()
    with torch.no_grad():
        key, _ = run(backbone, [0], ROWS)[0]
        bare = backbone.layers[0].attn.Wqkv(backbone.embeddings(pad(ROWS, 0)[0]))[..., 32:64].unflatten(-1, (2, 16))
    assert torch.equal(key[:, 0], bare[:, 0])
    assert not torch.allclose(key[:, 1], bare[:, 1])


@pytest.mark.parametrize("kind", SUPPORTED)
def test_padding_is_masked(kind):
    torch.manual_seed(0)
    backbone = build_backbone(backbone_config(kind, initializer_range=0.3)).eval()
    with torch.no_grad():
        alone = run(backbone, [2], ROWS[1:])
        padded = run(backbone, [2], ROWS)
    for got, want in zip(padded[2], alone[2], strict=True):
        torch.testing.assert_close(got[1:, :3], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("last", [0, 1])
def test_the_pass_stops_after_the_last_tap(kind, last):
    backbone = build_backbone(backbone_config(kind)).eval()
    ran = []
    for layer in layers_of(backbone):
        feed_forward = layer.get_submodule(FEED_FORWARD.get(kind, "intermediate"))
        feed_forward.register_forward_hook(lambda *_: ran.append(1))
    tap = KeyValueTap([last], stop_after_last=True)
    ids, mask = pad(ROWS, 0)
    with pytest.raises(LastTapReached):
        backbone(input_ids=ids, attention_mask=mask, key_value_tap=tap)
    assert len(ran) == last
    with torch.no_grad():
        for got, want in zip(tap[last], run(backbone, [last], ROWS)[last], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_attention_probabilities_are_not_dropped_in_training(kind, monkeypatch):
    asked_for = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda *rows, dropout_p=0.0, **options: asked_for.append(dropout_p) or kernel(*rows, **options),
    )
    config = backbone_config(kind)
    name = "attention_dropout" if kind in ("distilbert", "modernbert") else "attention_probs_dropout_prob"
    setattr(config, name, 0.5)
    run(build_backbone(config).train(), [0], ROWS)
    assert asked_for == [0.0] * 3


@pytest.mark.parametrize("trained", [True, False])
def test_training_in_bfloat16_attends_in_float32_on_a_cpu(trained, monkeypatch):
    """PyTorch's backward pass of attention in bfloat16 takes several times as long as that in float32."""
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(query, *rows, **options):
        out = kernel(query, *rows, **options)
        seen.append((query.dtype, out.dtype))
        return out

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    backbone = build_backbone(backbone_config("bert")).train(trained)
    with torch.set_grad_enabled(trained), torch.autocast("cpu", torch.bfloat16):
        run(backbone, [0], ROWS)
    expected = torch.float32 if trained else torch.bfloat16
    assert seen == [(expected, expected)] * 3


@pytest.mark.parametrize("kind", ["bert", "albert", "distilbert"])
def test_concurrent_passes_do_not_share_a_tap(kind):
    torch.manual_seed(0)
    config = MixEncoderConfig(backbone_config(kind, initializer_range=0.3), interaction_layers=(0, 1))
    model = MixEncoderModel(config).eval()
    texts = [torch.tensor([[2, 5 + number, 6 + number, 3]]) for number in range(8)]
    with torch.no_grad():
        alone = [model.encode_query(ids) for ids in texts]
    failures, start = [], threading.Barrier(len(texts))

    def work(number: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(20):
                state = model.encode_query(texts[number])
                model.encode_document(texts[number])
                for got, want in zip(state.keys + state.values, alone[number].keys + alone[number].values, strict=True):
                    if not torch.equal(got, want):
                        failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_backbone_whose_attention_was_changed_says_so():
    model = MixEncoderModel(MixEncoderConfig(backbone_config())).eval()
    model.backbone.set_attn_implementation("eager")
    with pytest.raises(UnsupportedBackboneError, match=r"attn_implementation=.*set_attn_implementation"):
        model.encode_query(torch.tensor([[2, 5, 3]]))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MPNetConfig(), "relative position bias and does not run through transformers' attention interface"),
        (DebertaConfig(), "disentangled attention does not run through transformers' attention interface"),
        (DebertaV2Config(), "disentangled attention does not run through transformers' attention interface"),
        (CamembertConfig(), "no test has shown"),
        (GPT2Config(), "no test has shown"),
        (PreTrainedConfig(), "no test has shown"),
        (AlbertConfig(inner_group_num=2), "attend 2 times each"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_other_backbones_are_refused_with_the_reason(config, reason):
    for refuse in (layout_of, build_backbone):
        with pytest.raises(UnsupportedBackboneError) as caught:
            refuse(config)
        for word in (f'"{config.model_type}"', reason, ", ".join(SUPPORTED)):
            assert word in str(caught.value)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_every_position_can_be_used_and_no_more(kind):
    config = backbone_config(kind, pad_token_id=1)
    # RoBERTa's positions start after the padding index
    positions = 38 if "roberta" in kind else 40
    assert max_positions(config) == positions
    ids = torch.full((1, positions), 5)
    with torch.no_grad():
        assert build_backbone(config)(input_ids=ids).last_hidden_state.shape == (1, positions, 32)
