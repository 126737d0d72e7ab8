"""The bundled default checkpoint: it loads without a network, is small, described, and ranks everyday questions."""

import hashlib
import json
import os
import re

import pytest
import torch

from benchmarks.checkpoint.card import CARD, PRETRAINED, rendered
from benchmarks.report.tables import FOLDER
from mixencoder import MixEncoder
from mixencoder.bundled import default_checkpoint

EVERYDAY = {
    "How do I undo my last git commit?": "Use git reset --soft HEAD~1 to take back the most recent commit.",
    "What is the capital of France?": "Paris has been the seat of the French government for centuries.",
    "How long should I boil an egg?": "For a soft yolk, leave it in boiling water for six minutes.",
    "Why is the sky blue?": "Air scatters short wavelengths of sunlight more than long ones.",
    "My laptop does not connect to wifi": "Restart the router and check that the wireless adapter is switched on.",
    "How can I sleep better at night?": "Go to bed at the same hour and avoid screens and coffee in the evening.",
    "Who wrote Romeo and Juliet?": "The tragedy is one of Shakespeare's most famous plays.",
    "How do I change a flat tire?": "Loosen the lug nuts, jack up the car, and put on the spare wheel.",
    "What does a cat eat?": "Felines are carnivores and need meat in their diet.",
    "How do plants make food?": "Photosynthesis turns light, water and carbon dioxide into sugar.",
}


@pytest.fixture(scope="module")
def model() -> MixEncoder:
    os.environ["HF_HUB_OFFLINE"] = "1"
    return MixEncoder.from_pretrained()


def test_it_is_small_and_holds_nothing_but_safetensors():
    files = list(default_checkpoint().iterdir())
    assert sum(file.stat().st_size for file in files) <= 58e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".md", ".yaml"}


def test_it_is_the_promised_size(model):
    assert len(model.config.interaction_layers) == 1
    assert model.config.num_context_embeddings <= 2
    assert model.dtype == torch.float32


def test_everyday_questions_find_their_answer_first(model):
    answers = list(EVERYDAY.values())
    rankings = model.rank(list(EVERYDAY), answers, top_k=1)
    right = sum(ranking[0]["corpus_id"] == place for place, ranking in enumerate(rankings))
    assert right >= 9, [(query, answers[r[0]["corpus_id"]]) for query, r in zip(EVERYDAY, rankings, strict=True)]


def test_bits_do_not_depend_on_the_neighbours_at_the_real_size(model):
    answers = list(EVERYDAY.values())
    query = "Why is the sky blue?"
    crowd = model.interact(model.encode_query([*EVERYDAY, query]), model.encode_document(answers * 20))[-1]
    for place, answer in enumerate(answers):
        alone = model.predict((query, answer))
        assert (crowd[place :: len(answers)] == float(alone)).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_an_encoding_does_not_depend_on_the_batch_at_any_length(model, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tokens = model.read_document([" ".join(EVERYDAY.values())])[0]
        for length in (*range(3, 24), 25, 33, 35, 38):
            # different texts, since equal ones are encoded once
            row, *others = [[tokens[0], *tokens[start : start + length - 2], tokens[-1]] for start in range(1, 10)]
            crowd = [row, *others]
            for encode in (model.encode_rows, lambda rows: model._encode_queries(rows, 32, False).pooled):
                assert torch.equal(encode([row]), encode(crowd)[:1]), length
    finally:
        torch.set_num_threads(before)


def test_the_card_names_data_licences_commands_and_quality():
    card = (default_checkpoint() / "README.md").read_text(encoding="utf-8")
    for word in ("CC BY", "mixencoder train", "mixencoder evaluate", "interaction alone", "dual term alone", "SciFact"):
        assert word in card
    assert re.search(r"0\.\d{3}", card)


def test_the_card_is_what_the_records_say():
    assert CARD.read_text(encoding="utf-8") == rendered(PRETRAINED, FOLDER)


def test_the_records_are_those_of_these_weights():
    record = json.loads((FOLDER / "quality_default.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256((PRETRAINED / "model.safetensors").read_bytes()).hexdigest()
    assert record["provenance"]["weights_sha256"] == {"model.safetensors": digest}


def test_the_second_head_tells_plain_cases_apart(model):
    pairs = [
        ("A man is playing a guitar on stage.", "A man plays an instrument."),
        ("A man is playing a guitar on stage.", "Nobody is playing a guitar."),
    ]
    classes = model.predict(pairs, head="classification").argmax(axis=1)
    assert [model.config.id2label[number] for number in classes] == ["entailment", "contradiction"]


def test_probabilities_are_fitted(model):
    found = model.rank("Why is the sky blue?", list(EVERYDAY.values()), return_probabilities=True)
    assert all(0 < hit["probability"] < 1 for hit in found)
    assert found[0]["probability"] > found[-1]["probability"]
