"""`MixEncoder.explain`: rows sum to one, are the operator's own, belong to the tokens that were read."""

import copy
import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import mixencoder.explanation.attention as computed
from mixencoder import MixEncoder
from mixencoder.errors import EmptyTextWarning, InputError, MissingExtraError
from mixkernels import candidate_attention

QUERY, DOCUMENT = "how to undo a git commit", "undo the git commit in paris"
FORMS = {
    "published": {},
    "k4": {"num_context_embeddings": 4},
    "two layers": {"interaction_layers": (-2, -1)},
    "two layers, k4, dual": {"interaction_layers": (0, 2), "num_context_embeddings": 4, "dual_term": True},
    "three layers": {"interaction_layers": (-1, -1, -1), "num_context_embeddings": 2, "dual_term": True},
    "no state": {"state_row": False, "num_context_embeddings": 4, "interaction_layers": (-2, -1)},
    "no update": {"context_update": False, "interaction_layers": (-2, -1)},
    "first token": {"pooling": "first", "dual_term": True},
}


@pytest.fixture(scope="module", params=FORMS)
def model(request, backbone_path) -> MixEncoder:
    torch.manual_seed(3)
    return MixEncoder.from_backbone(backbone_path, **FORMS[request.param])


@pytest.fixture
def operator_calls(monkeypatch) -> list:
    """Note how the operator is called, and what it returns with its log-sum-exps."""
    calls = []

    def note(*tensors, **options):
        result = candidate_attention(*tensors, **options, return_lse=True)
        calls.append((tensors, result))
        return result

    monkeypatch.setattr(computed, "candidate_attention", note)
    return calls


def test_shapes_are_as_documented_and_rows_sum_to_one(model):
    found = model.explain(QUERY, DOCUMENT)
    config = model.config
    m, n, k = len(found.query_tokens), len(found.document_tokens), config.num_context_embeddings
    layers, heads = len(config.interaction_layers), config.backbone_config.num_attention_heads
    assert (m, n) == (len(model.read_query([QUERY])[0]), len(model.read_document([DOCUMENT])[0]))
    assert found.layers == config.interaction_layer_indices
    shapes = {"pooling": (k, n)}
    shapes |= {"context_attention": (layers, heads, k, m + k)} if config.context_update else {}
    shapes |= {"state_attention": (layers, heads, m)} if config.state_row else {}
    for name in ("pooling", "context_attention", "state_attention"):
        array = getattr(found, name)
        if name not in shapes:
            assert array is None
            continue
        assert (array.shape, array.dtype) == (shapes[name], np.float32)
        assert (array >= 0).all()
        np.testing.assert_allclose(array.sum(-1), 1, rtol=0, atol=1e-6)
    assert found.query_weights.shape == (m,)
    assert 0 < found.query_weights.sum() <= 1 + 1e-6


def test_attention_agrees_with_what_the_operator_returns(model, operator_calls):
    found = model.explain(QUERY, DOCUMENT)
    assert len(operator_calls) == len(model.config.interaction_layers)
    scale = model.config.hidden_size // model.config.backbone_config.num_attention_heads
    for layer, ((query, own_key, own_value, state_query, key, value), result) in enumerate(operator_calls):
        if found.context_attention is not None:
            probs = torch.from_numpy(found.context_attention[layer])
            keys, values = (
                torch.cat([key[0], own_key.flatten(0, -4)[0]]),
                torch.cat([value[0], own_value.flatten(0, -4)[0]]),
            )
            context = torch.einsum("hkj,jhd->khd", probs, values)
            torch.testing.assert_close(context, result.context.flatten(0, -4)[0])
            # log of a probability is its logit less the operator's log-sum-exp
            logits = torch.einsum("khd,jhd->hkj", query.flatten(0, -4)[0], keys) / math.sqrt(scale)
            lse = result.context_lse.flatten(0, -3)[0].T.unsqueeze(-1)
            torch.testing.assert_close(probs, (logits - lse).exp())
        if found.state_attention is not None:
            probs = torch.from_numpy(found.state_attention[layer])
            torch.testing.assert_close(torch.einsum("hj,jhd->hd", probs, value[0]), result.state.flatten(0, -3)[0])
            logits = torch.einsum("hd,jhd->hj", state_query.flatten(0, -3)[0], key[0]) / math.sqrt(scale)
            torch.testing.assert_close(probs, (logits - result.state_lse.flatten(0, -2)[0].unsqueeze(-1)).exp())


def test_pooling_gives_the_context_embeddings(model):
    found = model.explain(QUERY, DOCUMENT)
    ids = torch.tensor(model.read_document([DOCUMENT]))
    with torch.inference_mode():
        tokens = model.model.backbone(input_ids=ids).last_hidden_state[0]
    contexts = torch.from_numpy(found.pooling) @ tokens
    torch.testing.assert_close(contexts, model.encode_document([DOCUMENT])[0], rtol=1e-5, atol=1e-5)


def test_terms_are_the_models_own_bit_for_bit(model):
    found = model.explain(QUERY, DOCUMENT)
    parts = {"full": found.score, "interaction": found.interaction, "dual": found.dual}
    for name, value in parts.items():
        if value is not None:
            assert value == model.predict([(QUERY, DOCUMENT)], head="ranking", score=name)[0]
    assert (found.dual is not None) == model.config.dual_term
    assert (
        found.score
        == model.rank(QUERY, ["dog cat", DOCUMENT])[
            0 if model.rank(QUERY, ["dog cat", DOCUMENT])[0]["corpus_id"] else 1
        ]["score"]
    )
    assert found.score == pytest.approx(found.interaction + (found.dual or 0), abs=1e-5)


@pytest.fixture(scope="module")
def bundled() -> MixEncoder:
    return MixEncoder.from_pretrained()


def test_words_are_those_of_the_text_with_the_weights_of_their_tokens(bundled):
    query = "  Don't undo the gitlab-commit, 水水 naïve!"
    found = bundled.explain(query, "Use git reset --soft HEAD~1.")
    words = found.query_words()
    texts = ["Don", "'", "t", "undo", "the", "gitlab", "-", "commit", ",", "水", "水", "naïve", "!"]
    assert [word.text for word in words] == texts
    assert all(query[word.start : word.end] == word.text for word in words)
    special = [number for number, token in enumerate(found.query_tokens) if token.word is None]
    assert [found.query_tokens[number].text for number in special] == ["[CLS]", "[SEP]"]
    total = sum(word.weight for word in words)
    assert total == pytest.approx(found.query_weights.sum() - found.query_weights[special].sum(), abs=1e-6)
    gitlab = [number for number, token in enumerate(found.query_tokens) if token.word == 5]
    assert len(gitlab) > 1
    assert words[5].weight == pytest.approx(found.query_weights[gitlab].sum())
    assert [word.text for word in found.document_words()][:3] == ["Use", "git", "reset"]
    assert found.probability == pytest.approx(bundled.probability(found.score))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.filterwarnings("ignore::mixencoder.errors.TruncationWarning")
def test_of_texts_that_are_too_long_the_tokens_that_were_read_are_shown(model, words, side):
    # the tiny model reads 40 tokens
    text = " ".join(words[number % len(words)] for number in range(100))
    model = copy.copy(model)
    model.read_query = dataclasses.replace(model.read_query, truncation_side=side)
    found = model.explain(text, text)
    shown = [word.text for word in found.query_words()]
    assert shown == (text.split()[:38] if side == "right" else text.split()[-38:])
    assert [text[word.start : word.end] for word in found.query_words()] == shown
    assert [word.text for word in found.document_words()] == text.split()[:38]
    assert len(found.query_tokens) == len(found.document_tokens) == 40
    assert found.score == model.predict([(text, text)], head="ranking")[0]


def test_texts_without_tokens_are_read_as_special_tokens_alone(checkpoint):
    model = MixEncoder.from_pretrained(checkpoint)
    with pytest.warns(EmptyTextWarning):
        found = model.explain("", " ")
    assert [token.text for token in found.query_tokens] == ["[CLS]", "[SEP]"]
    assert found.query_words() == found.document_words() == []
    with pytest.raises(InputError, match="holds no token"):
        model.with_limits(on_empty="error").explain("", "dog")


@pytest.mark.parametrize("texts", [(1, "dog"), ("dog", None), (["dog"], "dog"), ("dog", "\ud83d"), ("\ud83d", "dog")])
def test_what_is_no_text_is_refused(checkpoint, texts):
    with pytest.raises(InputError):
        MixEncoder.from_pretrained(checkpoint).explain(*texts)


def test_a_model_without_a_ranking_head_is_refused(backbone_path):
    model = MixEncoder.from_backbone(backbone_path, num_labels=3)
    with pytest.raises(InputError, match="ranking"):
        model.explain(QUERY, DOCUMENT)


def test_half_precision_sums_to_one_too(checkpoint):
    found = MixEncoder.from_pretrained(checkpoint, dtype="bfloat16").explain(QUERY, DOCUMENT)
    for array in (found.context_attention, found.state_attention, found.pooling):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array.sum(-1), 1, rtol=0, atol=1e-6)


def test_everything_can_be_written_as_json(model):
    found = model.explain(QUERY, DOCUMENT)
    again = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert again["query_tokens"][0] == {"text": "[CLS]", "start": None, "end": None, "word": None}
    assert again["query_tokens"][1] == {"text": "how", "start": 0, "end": 3, "word": 0}
    assert again["score"] == found.score
    assert np.allclose(again["pooling"], found.pooling)


@pytest.mark.parametrize("heads", [False, True])
def test_the_picture_has_a_panel_per_layer_and_all_tokens(model, heads, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    found = model.explain(QUERY, DOCUMENT)
    figure = found.plot(heads=heads)
    assert len(figure.axes) == len(model.config.interaction_layers)
    for axes in figure.axes:
        names = [label.get_text() for label in axes.get_xticklabels()]
        assert names[: len(found.query_tokens)] == [token.text for token in found.query_tokens]
        k = model.config.num_context_embeddings if model.config.context_update else 0
        rows = (k + model.config.state_row) * (2 if heads else 1)
        assert len(axes.get_yticklabels()) == rows
        assert axes.get_images()[0].get_array().shape == (rows, len(found.query_tokens) + k)
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_picture_without_matplotlib_names_the_extra(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"mixencoder\[plots\]"):
        MixEncoder.from_pretrained(checkpoint).explain(QUERY, DOCUMENT).plot()


def test_explaining_loads_no_picture_library():
    code = "import sys, mixencoder.fast; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
