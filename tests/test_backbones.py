"""Taps: keys and values as computed by hand, the early stop, threads, and encoders that are refused."""

import threading

import pytest
import torch
from conftest import backbone_config
from transformers import DebertaV2Config, DistilBertConfig, GPT2Config, MPNetConfig

from mixencoder import MixEncoderConfig, MixEncoderModel
from mixencoder.backbones import KeyValueTap, LastTapReached, build_backbone, check_backbone, max_positions
from mixencoder.errors import UnsupportedBackboneError
from mixencoder.training.data import pad

KINDS = ["bert", "roberta", "xlm-roberta"]


def run(backbone, layers, rows, *, stop=False):
    tap = KeyValueTap(layers, stop_after_last=stop)
    ids, mask = pad(rows, 0)
    output = backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True, key_value_tap=tap)
    return tap, output.hidden_states


@pytest.mark.parametrize("kind", KINDS)
def test_tapped_keys_and_values_equal_those_computed_by_hand(kind):
    torch.manual_seed(0)
    backbone = build_backbone(backbone_config(kind)).eval()
    with torch.no_grad():
        tap, hidden = run(backbone, [0, 2], [[2, 5, 6, 3], [2, 7, 3]])
        for layer in (0, 2):
            attention = backbone.encoder.layer[layer].attention.self
            for tapped, projection in zip(tap[layer], (attention.key, attention.value), strict=True):
                by_hand = projection(hidden[layer]).view(2, 4, 2, 16)
                assert torch.equal(tapped, by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_masked(kind):
    torch.manual_seed(0)
    backbone = build_backbone(backbone_config(kind, initializer_range=0.3)).eval()
    with torch.no_grad():
        alone, _ = run(backbone, [2], [[2, 7, 3]])
        padded, _ = run(backbone, [2], [[2, 7, 3], [2, 5, 6, 8, 9, 3]])
    torch.testing.assert_close(padded[2][0][:1, :3], alone[2][0], rtol=0, atol=1e-5)


def test_the_pass_stops_after_the_last_tap():
    backbone = build_backbone(backbone_config()).eval()
    ran = []
    for number, layer in enumerate(backbone.encoder.layer):
        layer.intermediate.register_forward_hook(lambda *_, number=number: ran.append(number))
    with pytest.raises(LastTapReached):
        run(backbone, [1], [[2, 5, 3]], stop=True)
    assert ran == [0]


def test_threads_do_not_meet():
    torch.manual_seed(0)
    model = MixEncoderModel(MixEncoderConfig(backbone_config(initializer_range=0.3), interaction_layers=(0, 1))).eval()
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
        (MPNetConfig(), "relative position bias"),
        (DebertaV2Config(), "disentangled attention"),
        (DistilBertConfig(), "not been shown"),
        (GPT2Config(), "not been shown"),
    ],
)
def test_other_backbones_are_refused_with_the_reason(config, reason):
    with pytest.raises(UnsupportedBackboneError) as caught:
        check_backbone(config)
    for word in (config.model_type, reason, "bert, roberta, xlm-roberta"):
        assert word in str(caught.value)


def test_positions_start_after_the_padding_index_in_roberta():
    assert max_positions(backbone_config("bert")) == 40
    assert max_positions(backbone_config("roberta", pad_token_id=1)) == 38
