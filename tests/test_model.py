"""The model against an independent writing of section 1 in float64, its configuration, and its files."""

import json

import model_oracle as oracle
import pytest
import torch
from conftest import backbone_config
from safetensors import safe_open
from transformers import AutoConfig, AutoModel

from mixencoder import MixEncoderConfig, MixEncoderModel
from mixencoder.training.data import pad

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
    first = 0 if config.model_type == "bert" else config.pad_token_id + 1
    sizes = (config.num_hidden_layers, config.num_attention_heads, config.layer_norm_eps, first)
    tokens, keys_values = oracle.backbone(weights, query, *sizes)
    document_tokens, _ = oracle.backbone(weights, document, *sizes)
    context = oracle.context_embeddings(weights, document_tokens)
    taps = [keys_values[layer] for layer in model.config.interaction_layers]
    h, e = oracle.interact(weights, context, taps, config.num_attention_heads, config.layer_norm_eps)
    pooled = (tokens.mean(0), context.mean(0))
    out = {"interaction": h @ e, "context": context}
    pairs = [(h, e)]
    if model.config.dual_term:
        out["dual"] = weights["dual_scale"] * oracle.cosine(*pooled)
        pairs.append(pooled)
    if model.classifier is not None:
        out["logits"] = oracle.classify(weights, pairs)
    return out


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("layers", [(-1,), (1, -1)], ids=["J=1", "J=2"])
@pytest.mark.parametrize("dual_term", [False, True], ids=["published", "dual"])
def test_the_whole_model_equals_section_1_written_with_loops(kind, k, layers, dual_term):
    model = build(
        kind,
        num_context_embeddings=k,
        interaction_layers=layers,
        dual_term=dual_term,
        heads=("ranking", "classification"),
        num_labels=3,
    )
    queries, documents = pad(QUERIES, 0), pad(DOCUMENTS, 0)
    with torch.no_grad():
        scores = model(*queries, *documents, head="ranking")
        logits = model(*queries, *documents, head="classification")
        context = model.encode_document(*documents)
        for row, query in enumerate(QUERIES):
            for column, document in enumerate(DOCUMENTS):
                want = expected(model, query, document)
                torch.testing.assert_close(context[column], want["context"], rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(scores.interaction[row, column], want["interaction"], rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(logits[row, column], want["logits"], rtol=1e-10, atol=1e-10)
                if dual_term:
                    torch.testing.assert_close(scores.dual[row, column], want["dual"], rtol=1e-10, atol=1e-10)


def test_candidates_of_each_query_equal_the_pool():
    model = build(num_context_embeddings=3, interaction_layers=(0, 2))
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


def test_every_weight_is_trained():
    model = build(num_context_embeddings=2, interaction_layers=(1, -1), dual_term=True)
    model(*pad(QUERIES, 0), *pad(DOCUMENTS, 0)).full.sin().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # a key's bias shifts all logits of a row alike, unless own keys stand beside the shared ones
    assert all("attention.self.key.bias" in name for name in without), without


def test_interaction_layers_start_from_the_backbone():
    model = build(interaction_layers=(1,))
    model.start_interaction_from_backbone()
    block, layer = model.backbone.encoder.layer[1], model.interaction[0]
    assert torch.equal(layer.query.weight, block.attention.self.query.weight)
    assert torch.equal(layer.state_query.weight, block.attention.self.query.weight)
    assert torch.equal(layer.output_norm.bias, block.output.LayerNorm.bias)


def test_codes_start_as_published_and_near_zero_with_the_dual_term():
    torch.manual_seed(0)
    config = backbone_config(hidden_size=256, num_attention_heads=4)
    published = MixEncoderModel(MixEncoderConfig(config, num_context_embeddings=4)).codes
    assert 0.9 < published.std() < 1.1
    dual = MixEncoderModel(MixEncoderConfig(config, num_context_embeddings=4, dual_term=True))
    assert 0 < dual.codes.std() < 0.05
    assert not MixEncoderModel(MixEncoderConfig(config, dual_term=True)).codes.any()
    assert dual.dual_scale.item() == 20.0


def test_saving_and_loading_through_the_auto_classes_keeps_everything(tmp_path):
    model = build(num_context_embeddings=3, dual_term=True, query_truncation_side="left").float()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MixEncoderConfig)
    assert (config.num_context_embeddings, config.query_truncation_side) == (3, "left")
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, MixEncoderModel)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    inputs = (*pad(QUERIES, 0), *pad(DOCUMENTS, 0))
    assert torch.equal(again.eval()(*inputs).full, model(*inputs).full)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mixencoder"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_context_embeddings": 0}, "num_context_embeddings is 0; expected an integer in 1..16"),
        ({"num_context_embeddings": 17}, "1..16"),
        ({"interaction_layers": (3,)}, "-3..2, the backbone has 3 layers"),
        ({"interaction_layers": ()}, "1 to 3 layer numbers"),
        ({"heads": ("regression",)}, "ranking, classification"),
        ({"heads": ("ranking", "ranking")}, "each once"),
        ({"query_truncation_side": "middle"}, '"left" or "right"'),
        ({"max_query_length": 2}, "max_query_length is 2"),
    ],
)
def test_a_configuration_out_of_range_is_refused(changes, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        MixEncoderConfig(backbone_config(), **changes)
