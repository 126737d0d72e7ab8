"""Training the layers on top of a frozen encoder: same gradients as without the shortcut, and stored vectors stay."""

import dataclasses

import pytest
import torch

from mixencoder import MixEncoder
from mixencoder.data.examples import read_source
from mixencoder.errors import InputError, UnknownIdError
from mixencoder.training.batches import Collator, TokenInputs
from mixencoder.training.frozen import FrozenEncodings
from mixencoder.training.objective import Objective
from mixencoder.training.run import DataSpec, TrainConfig, train
from tests.training.synthetic import PAIRS, partner_pairs, ranking_accuracy

FIELDS = {"dual_term": True, "query_adapter_size": 8}


def options(tmp_path, backbone_path, words, **changes) -> TrainConfig:
    fields = {"output": tmp_path / "out", "data": [DataSpec(partner_pairs(words, 40))], "backbone": backbone_path}
    fields |= {"config": FIELDS, "freeze_encoder": True, "steps": 3, "batch_size": 8}
    return TrainConfig(**(fields | changes))


@pytest.mark.parametrize(
    "fields",
    [FIELDS, {"interaction_layers": [0, 1], "num_context_embeddings": 3}, {"state_row": False}],
    ids=["adapter", "two-layers", "no-state-row"],
)
def test_encodings_give_the_loss_and_gradients_of_the_texts(backbone_path, words, fields):
    engine = MixEncoder.from_backbone(backbone_path, **fields)
    source = read_source(partner_pairs(words, 12))
    texts = TokenInputs(engine.read_query, engine.read_document, engine.tokenizer.pad_token_id)
    encoded = FrozenEncodings(engine.model, engine.read_query, engine.read_document, [source])
    items = [("ranking", example) for example in source.examples]
    found = []
    for inputs in (texts, encoded):
        engine.model.zero_grad()
        loss, _ = Objective()(engine.model.eval(), Collator(inputs, negatives=1, seed=0)(items))
        loss.backward()
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in engine.model.named_parameters()
            if parameter.grad is not None and name not in engine.model.encoder_weights()
        }
        found.append((loss.detach(), gradients))
    (loss, gradients), (encoded_loss, encoded_gradients) = found
    # queries' keys and values are kept in float16
    torch.testing.assert_close(encoded_loss, loss, rtol=1e-3, atol=0)
    assert encoded_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (encoded_gradients[name] - gradient).norm() <= 0.03 * gradient.norm() + 1e-5, name


def test_only_the_layers_on_top_change_and_an_index_serves_the_trained_model(tmp_path, backbone_path, words):
    before = MixEncoder.from_backbone(backbone_path, **FIELDS)
    before.save_pretrained(tmp_path / "before")
    index = before.index([f"{word} the" for word in words], layout="compact")
    engine = train(
        options(tmp_path, backbone_path, words, backbone=None, config={}, model=tmp_path / "before", steps=5)
    )
    old, new = before.model.state_dict(), engine.model.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert not changed & before.model.encoder_weights().keys()
    assert any(name.startswith("interaction.") for name in changed)
    assert "query_adapter.outer.weight" in changed
    assert engine.rank("how", index, top_k=3) != before.rank("how", index, top_k=3)


def test_documents_of_an_index_are_named_by_id_and_give_the_same_training(tmp_path, backbone_path, words):
    before = MixEncoder.from_backbone(backbone_path, **FIELDS)
    before.save_pretrained(tmp_path / "before")
    rows = partner_pairs(words, 40)
    texts = sorted({row["positive"] for row in rows})
    # as long as the texts, since batches are drawn by length
    ids = {text: text.replace(" ", "_") for text in texts}
    before.index(texts, ids.values(), tmp_path / "index", precision="float32").close()
    shared = {"backbone": None, "config": {}, "model": tmp_path / "before"}
    one = train(options(tmp_path, backbone_path, words, data=[DataSpec(rows)], **shared))
    named = [{"query": row["query"], "positive": ids[row["positive"]]} for row in rows]
    fields = {"data": [DataSpec(named)], "index": tmp_path / "index", "output": tmp_path / "other"}
    other = train(options(tmp_path, backbone_path, words, **shared, **fields))
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], weight, rtol=0, atol=1e-5, msg=name)
    fields |= {"data": [DataSpec([*named, {"query": "how", "positive": "unknown"}])], "output": tmp_path / "third"}
    with pytest.raises(UnknownIdError, match="unknown"):
        train(options(tmp_path, backbone_path, words, **shared, **fields))


def test_a_run_goes_on_only_with_the_vectors_that_it_was_begun_with(tmp_path, backbone_path, words, monkeypatch):
    before = MixEncoder.from_backbone(backbone_path, **FIELDS)
    before.save_pretrained(tmp_path / "before")
    rows = partner_pairs(words, 40)
    texts = sorted({row["positive"] for row in rows})
    index = before.index(texts, texts, tmp_path / "index", precision="float32")
    fields = {
        "backbone": None,
        "config": {},
        "model": tmp_path / "before",
        "index": tmp_path / "index",
        "save_every": 1,
    }
    config = options(tmp_path, backbone_path, words, data=[DataSpec(rows)], **fields)
    with monkeypatch.context() as patch:
        patch.setattr("mixencoder.training.run.save", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    index.update(["another text"], [texts[0]])
    with pytest.raises(InputError, match="begun with other contents of index; resume with what it read"):
        train(dataclasses.replace(config, resume=True))
    index.update([texts[0]], [texts[0]])
    train(dataclasses.replace(config, resume=True))


def test_a_relation_is_learned_without_training_the_encoder(tmp_path, backbone_path, words):
    fields = {"data": [DataSpec(partner_pairs(words, 300))], "config": {"dual_term": True, "query_adapter_size": 64}}
    config = options(tmp_path, backbone_path, words, **fields, steps=200, batch_size=16, head_learning_rate=1e-2)
    assert ranking_accuracy(train(config), words) > 4 / PAIRS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "dual-encoder", "config": {}}, "freeze_encoder is True, but the model is a DualEncoder"),
        ({"freeze_encoder": False, "index": "somewhere"}, "index is 'somewhere', but freeze_encoder is False"),
        ({"index": "somewhere", "teacher": "bundled"}, "index and teacher were both given"),
        ({"config": {"query_adapter_size": 8}}, "query_adapter_size is 8, but dual_term is False"),
        ({"config": {"dual_term": True, "query_adapter_size": 0}}, "query_adapter_size"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(tmp_path, backbone_path, words, changes, message):
    with pytest.raises(InputError, match=message):
        train(options(tmp_path, backbone_path, words, **changes))


def test_an_untrained_adapter_changes_no_bit(backbone_path):
    plain = MixEncoder.from_backbone(backbone_path, dual_term=True)
    adapted = MixEncoder.from_backbone(backbone_path, **FIELDS)
    adapted.model.load_state_dict(plain.model.state_dict(), strict=False)
    pairs = [("how the cat", "the dog"), ("a", "b c d")]
    assert (plain.predict(pairs) == adapted.predict(pairs)).all()
