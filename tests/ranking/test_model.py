"""The model against an independent writing of section 1 in float64, its configuration, and its files."""

import json
import re
from functools import partial
from pathlib import Path

import model_oracle as oracle
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel

from mixencoder import MixEncoderConfig, MixEncoderModel
from mixencoder.base.backbones import SUPPORTED, encoder_layers
from mixencoder.base.tokenization import pad
from tests.conftest import backbone_config

QUERIES = [[2, 5, 6, 7, 8, 3], [2, 9, 3], [2, 10, 11, 12, 3]]
DOCUMENTS = [[2, 13, 14, 3], [2, 15, 16, 17, 18, 19, 3], [2, 20, 3], [2, 5, 9, 13, 3]]


def build(kind="bert", *, scale=0.3, **changes) -> MixEncoderModel:
    torch.manual_seed(3)
    config = MixEncoderConfig(backbone_config(kind, initializer_range=scale), **changes)
    model = MixEncoderModel(config).double().eval()
    with torch.no_grad():  # biases and norms too, or a missing one would go unseen
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name == "codes":
                parameter.copy_(torch.randn_like(parameter))
    return model


def expected(model: MixEncoderModel, query: list[int], document: list[int]) -> dict[str, torch.Tensor]:
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config = model.config.backbone_config
    kind = config.model_type
    sizes = oracle.Sizes(
        kind,
        config.num_hidden_layers,
        config.num_attention_heads,
        eps={"distilbert": 1e-12, "modernbert": 1e-5}.get(kind) or config.layer_norm_eps,
        first_position=config.pad_token_id + 1 if "roberta" in kind else 0,
        window=2,
    )
    tokens, keys_values = oracle.backbone(weights, query, sizes)
    document_tokens, _ = oracle.backbone(weights, document, sizes)
    context = oracle.context_embeddings(weights, document_tokens)
    taps = [keys_values[layer] for layer in model.config.interaction_layers]
    without = "state" if not model.config.state_row else "context" if not model.config.context_update else ""
    h, e = oracle.interact(weights, context, taps, sizes, without)
    if without == "state":
        h = tokens[0]
    if without == "context":
        e = context.mean(0)
    pooled = (tokens[0] if model.config.pooling == "first" else tokens.mean(0), context.mean(0))
    out = {"interaction": h @ e, "context": context}
    pairs = [(h, e)]
    if model.config.dual_term:
        out["dual"] = weights["dual_scale"] * oracle.cosine(*pooled)
        pairs.append(pooled)
    if model.classifier is not None:
        out["logits"] = oracle.classify(weights, pairs)
    return out


def check_against_the_oracle(model: MixEncoderModel) -> None:
    # transformers rotates ModernBERT's queries and keys in float32, whatever the weights' precision
    tolerance = 1e-5 if model.config.backbone_config.model_type == "modernbert" else 1e-10
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    queries, documents = pad(QUERIES, 0), pad(DOCUMENTS, 0)
    with torch.no_grad():
        scores = model(*queries, *documents, head="ranking")
        logits = model(*queries, *documents, head="classification")
        context = model.encode_document(*documents)
        for row, query in enumerate(QUERIES):
            for column, document in enumerate(DOCUMENTS):
                want = expected(model, query, document)
                close(context[column], want["context"])
                close(scores.interaction[row, column], want["interaction"])
                close(logits[row, column], want["logits"])
                if model.config.dual_term:
                    close(scores.dual[row, column], want["dual"])


HEADS = {"heads": ("ranking", "classification"), "num_labels": 3}


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("dual_term", [False, True], ids=["published", "dual"])
def test_the_whole_model_equals_section_1_written_with_loops(kind, dual_term):
    model = build(kind, num_context_embeddings=3, interaction_layers=(1, -1), dual_term=dual_term, **HEADS)
    check_against_the_oracle(model)


@pytest.mark.parametrize("k", [1, 3, 10, 16])
@pytest.mark.parametrize("layers", [(-1,), (0,), (-2, 2), (0, 1, -1), (2, -3, 2)], ids=str)
def test_any_number_of_context_embeddings_and_any_layers(k, layers):
    check_against_the_oracle(build(num_context_embeddings=k, interaction_layers=layers, **HEADS))


ABLATIONS = [{"state_row": False}, {"context_update": False}]


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
@pytest.mark.parametrize("layers", [(-1,), (0, -1)], ids=str)
@pytest.mark.parametrize("dual_term", [False, True], ids=["published", "dual"])
def test_ablations_equal_theirs_written_with_loops(ablation, layers, dual_term):
    model = build(num_context_embeddings=3, interaction_layers=layers, dual_term=dual_term, **HEADS, **ablation)
    check_against_the_oracle(model)


@pytest.mark.parametrize("options", [{}, *ABLATIONS], ids=str)
@pytest.mark.parametrize("dual_term", [False, True], ids=["published", "dual"])
def test_the_first_token_may_stand_for_a_text(options, dual_term):
    check_against_the_oracle(build(pooling="first", dual_term=dual_term, **HEADS, **options))


@pytest.mark.parametrize("ablation", [{}, *ABLATIONS], ids=str)
def test_candidates_of_each_query_equal_the_pool(ablation):
    model = build(num_context_embeddings=3, interaction_layers=(0, 2), **ablation)
    queries = pad(QUERIES[:2], 0)
    with torch.no_grad():
        pool = model(*queries, *pad(DOCUMENTS, 0)).full
        # query 0 meets documents 0 and 1, query 1 meets 2 and 3
        own = model(*queries, *pad(DOCUMENTS, 0), candidates_per_query=2).full
    torch.testing.assert_close(own, torch.stack([pool[0, :2], pool[1, 2:]]), rtol=1e-12, atol=1e-12)


def test_dropout_acts_in_training_alone():
    model = build()
    inputs = (*pad(QUERIES, 0), *pad(DOCUMENTS, 0))
    assert torch.equal(model(*inputs).full, model(*inputs).full)
    model.train()
    assert not torch.equal(model(*inputs).full, model(*inputs).full)
    assert model.config.backbone_config.attention_probs_dropout_prob == 0.0


@pytest.mark.parametrize("ablation", [{}, *ABLATIONS], ids=str)
def test_every_weight_is_trained(ablation):
    model = build(num_context_embeddings=2, interaction_layers=(1, -1), dual_term=True, **ablation)
    model(*pad(QUERIES, 0), *pad(DOCUMENTS, 0)).full.sin().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # a key's bias shifts all logits of a row alike, unless own keys stand beside the shared ones
    assert all("attention.self.key.bias" in name for name in without), without


def test_interaction_layers_start_from_the_backbone():
    model = build(interaction_layers=(1,))
    model.start_from_backbone()
    block, layer = model.backbone.encoder.layer[1], model.interaction[0]
    assert torch.equal(layer.query.weight, block.attention.self.query.weight)
    assert torch.equal(layer.state_query.weight, block.attention.self.query.weight)
    assert torch.equal(layer.output_norm.bias, block.output.LayerNorm.bias)


@pytest.mark.parametrize("kind", [kind for kind in SUPPORTED if kind != "modernbert"])
def test_at_the_start_an_interaction_layer_repeats_the_backbones(kind):
    # one context embedding and a query of which nothing is seen: the layer is the backbone's own, on one token
    model = build(kind, interaction_layers=(1,))
    model.start_from_backbone()
    token = torch.randn(1, 1, 32, dtype=torch.float64)
    with torch.no_grad():
        layer = encoder_layers(model.backbone)[1]
        want = layer(token)
        attend = lambda query, key, value, state_query: (value, state_query)  # noqa: E731  (a softmax over one key)
        got, _ = model.interaction[0](token, None, attend, model.gate)
    torch.testing.assert_close(got, want if isinstance(want, torch.Tensor) else want[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_an_interaction_layer_takes_the_backbones_dropout_activation_and_epsilon(kind):
    own = {
        "distilbert": {"dropout": 0.25, "activation": "relu", "hidden_dim": 56},
        "modernbert": {"mlp_dropout": 0.25, "hidden_activation": "relu", "intermediate_size": 56, "norm_eps": 1e-3},
    }
    usual = {"hidden_dropout_prob": 0.25, "hidden_act": "relu", "intermediate_size": 56, "layer_norm_eps": 1e-3}
    model = MixEncoderModel(MixEncoderConfig(backbone_config(kind, **own.get(kind, usual))))
    layer, eps = model.interaction[0], 1e-12 if kind == "distilbert" else 1e-3
    assert layer.dropout.p == 0.25
    assert layer.activation(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
    assert layer.intermediate.out_features == layer.output.in_features == 56
    assert layer.attention_norm.eps == layer.output_norm.eps == eps


@pytest.mark.parametrize(
    ("options", "whole_layers"),
    [({}, 1), ({"context_update": False}, 1), ({"dual_term": True}, 3), ({"state_row": False}, 3)],
    ids=str,
)
def test_the_query_pass_stops_after_the_last_tap_unless_final_vectors_are_needed(options, whole_layers):
    model = build(interaction_layers=(1, 0), **options)
    ran = []
    for layer in model.backbone.encoder.layer:
        layer.output.register_forward_hook(lambda *_: ran.append(1))
    model.encode_query(*pad(QUERIES, 0))
    assert len(ran) == whole_layers


@pytest.mark.parametrize("options", [{"dual_term": True}, *ABLATIONS], ids=str)
def test_the_state_of_one_query_scores_as_among_others(options):
    model = build(interaction_layers=(0, -1), **options)
    with torch.no_grad():
        state, candidates = model.encode_query(*pad(QUERIES, 0)), model.encode_document(*pad(DOCUMENTS, 0))
        together = model.interact(state, candidates).full
        for number in range(len(state)):
            alone = model.interact(state.select(number), candidates).full
            torch.testing.assert_close(alone[0], together[number], rtol=1e-12, atol=1e-12)


def test_modernbert_lends_its_attention_alone():
    model = build("modernbert", interaction_layers=(2,))
    fresh = {name: tensor.clone() for name, tensor in model.interaction[0].state_dict().items()}
    model.start_from_backbone()
    attention, layer = model.backbone.layers[2].attn, model.interaction[0]
    started = torch.cat([layer.query.weight, layer.key.weight, layer.value.weight])
    assert torch.equal(started, attention.Wqkv.weight)
    assert torch.equal(layer.state_query.weight, layer.query.weight)
    assert torch.equal(layer.attention_output.weight, attention.Wo.weight)
    for name in ("query", "key", "value", "state_query", "attention_output"):
        assert not getattr(layer, name).bias.any()
    for name in ("attention_norm", "intermediate", "output", "output_norm"):
        assert torch.equal(getattr(layer, name).weight, fresh[f"{name}.weight"])


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_ablations_start_from_the_backbone_and_hold_no_idle_weights(ablation):
    model = build(**ablation)
    model.start_from_backbone()
    names = set(model.interaction[0].state_dict()) | {name for name, _ in model.named_parameters()}
    idle = {"state_query.weight", "gate.weight"} if "state_row" in ablation else {"query.weight", "value.bias"}
    assert not idle & names
    norm = model.backbone.encoder.layer[2].output.LayerNorm
    assert torch.equal(model.interaction[0].output_norm.weight, norm.weight)


def test_codes_start_as_published_and_near_zero_with_the_dual_term():
    torch.manual_seed(0)
    config = backbone_config(hidden_size=256, num_attention_heads=4)
    published = MixEncoderModel(MixEncoderConfig(config, num_context_embeddings=4)).codes
    assert 0.9 < published.std() < 1.1
    dual = MixEncoderModel(MixEncoderConfig(config, num_context_embeddings=4, dual_term=True))
    assert 0 < dual.codes.std() < 0.05
    assert not MixEncoderModel(MixEncoderConfig(config, dual_term=True)).codes.any()
    assert dual.dual_scale.item() == 20.0


def check_round_trip(model: MixEncoderModel, folder: Path) -> None:
    model.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder)
    assert isinstance(again, MixEncoderModel)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    inputs = (*pad(QUERIES, 0), *pad(DOCUMENTS, 0))
    with torch.no_grad():
        assert torch.equal(again.eval()(*inputs).full, model(*inputs).full)


def test_saving_and_loading_through_the_auto_classes_keeps_everything(tmp_path):
    check_round_trip(build(num_context_embeddings=3, dual_term=True, query_truncation_side="left").float(), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MixEncoderConfig)
    assert (config.num_context_embeddings, config.query_truncation_side) == (3, "left")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mixencoder"


@pytest.mark.parametrize("kind", ["electra", "distilbert", "albert", "modernbert"])
def test_saving_and_loading_keeps_every_backbone(kind, tmp_path):
    check_round_trip(build(kind, interaction_layers=(1, -1)).float(), tmp_path)


@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
def test_saving_and_loading_keeps_ablations(ablation, tmp_path):
    check_round_trip(build(**ablation).float(), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in ablation} == ablation


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_context_embeddings": 0}, "num_context_embeddings is 0; expected an integer from 1 to 16"),
        ({"num_context_embeddings": 17}, "from 1 to 16"),
        ({"interaction_layers": (3,)}, "-3..2, the backbone has 3 layers"),
        ({"num_context_embeddings": True}, "num_context_embeddings is True"),
        ({"interaction_layers": ()}, "1 to 3 layer numbers"),
        ({"interaction_layers": (0, 1, 2, -1)}, "1 to 3 layer numbers"),
        ({"interaction_layers": (-4,)}, "-3..2, the backbone has 3 layers"),
        ({"interaction_layers": ("-1",)}, "-3..2, the backbone has 3 layers"),
        ({"interaction_layers": -1}, "interaction_layers is -1; expected a list of layer numbers"),
        ({"heads": ("regression",)}, "ranking, classification"),
        ({"heads": ("ranking", "ranking")}, "each once"),
        ({"heads": ()}, "heads is []; expected one or more of ranking, classification"),
        ({"heads": 1}, "heads is 1; expected a list of names of ranking, classification"),
        ({"heads": ("classification",), "num_labels": 0}, "num_labels is 0; expected an integer of at least 1"),
        ({"state_row": "no"}, "state_row is 'no'; expected True or False"),
        ({"context_update": 0}, "context_update is 0; expected True or False"),
        ({"pooling": "mean"}, "pooling is 'mean'; expected one of codes, first"),
        ({"pooling": "first", "num_context_embeddings": 2}, "expected num_context_embeddings = 1"),
        ({"dual_term": None}, "dual_term is None; expected True or False"),
        ({"state_row": False, "context_update": False}, "both False; expected at least one"),
        ({"dual_scale_init": "20"}, "dual_scale_init is '20'; expected a finite number"),
        ({"classifier_dropout": 1.0}, "classifier_dropout is 1.0; expected a number from 0 to below 1"),
        ({"classifier_dropout": None}, "classifier_dropout is None; expected a number from 0 to below 1"),
        ({"query_truncation_side": "middle"}, "query_truncation_side is 'middle'; expected one of left, right"),
        ({"max_query_length": 2}, "max_query_length is 2; expected an integer of at least 3"),
    ],
)
def test_a_configuration_out_of_range_is_refused(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        MixEncoderConfig(backbone_config(), **changes)
