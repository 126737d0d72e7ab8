"""The scripts that made the bundled checkpoint: pairs out of free texts, and the interaction's share."""

import pytest
import torch
import yaml

from benchmarks.checkpoint import second_head
from benchmarks.checkpoint.card import PRETRAINED, STAGES
from benchmarks.checkpoint.equal_dual import dual_stage
from benchmarks.checkpoint.free_pairs import answer_pairs, foldoc_pairs, package_pairs, wordnet_pairs
from benchmarks.checkpoint.second_head import head_inputs, train_head
from benchmarks.checkpoint.share import SHARES, figures_by_share, scale_interaction
from mixencoder import MixEncoder
from mixencoder.data.examples import Example
from mixencoder.evaluation.tasks import read_task
from mixencoder.training.run import TrainConfig
from tests.training.synthetic import write

PACKAGES = """Package: game-bin
Description-md5: 1
Description-en: Strategy game of ancient warfare (binaries)
 A free game that lets players found villages, gather food and wood, and lead
 their people through the ages.
 .
 This package contains the binaries.

Package: game-data
Description-md5: 2
Description-en: Strategy game of ancient warfare (data files)
 A free game that lets players found villages, gather food and wood, and lead
 their people through the ages.

Package: lib-dev
Description-md5: 3
Description-en: reads images - development files
 This package contains the headers that are needed to compile programs which read images of many kinds.
"""


def test_a_description_that_packages_share_comes_once_and_boilerplate_never():
    (pair,) = package_pairs(PACKAGES)
    assert pair.query == "Strategy game of ancient warfare"
    assert pair.positive.startswith(
        "A free game that lets players found villages, gather food and wood, and lead their"
    )
    assert "binaries" not in pair.positive


def test_a_gloss_that_holds_its_own_word_is_left_out():
    lines = [
        "  1 licence text\n",
        '00003993 03 n 02 living_thing 0 animate_thing 0 000 | a (once living) entity of any kind; "it moved"\n',
        "00004258 03 n 01 unit 0 000 | a unit that is one of several units\n",
        "00004475 03 n 01 thing 0 000 | a separate item\n",
    ]
    (pair,) = wordnet_pairs(lines)
    assert pair == ("living thing, animate thing", "a (once living) entity of any kind")


def test_an_entry_gives_its_first_real_paragraph_without_its_marks():
    text = (
        "front matter\n\n   too short\n\nbuffer\n\n   <storage> A region of {memory} used to hold data while it is "
        "being moved from one place to another.\n\n   (1999-01-01)\n\n42\n\n   A number that is said to answer "
        "everything, in a book which many people have read.\n"
    )
    assert list(foldoc_pairs(text)) == [
        ("buffer", "A region of memory used to hold data while it is being moved from one place to another.")
    ]


def test_answers_are_the_entailed_sentences():
    rows = [
        {"premise": "Who?", "hypothesis": "She did.", "label": "entailment"},
        {"premise": "When?", "hypothesis": "It was blue.", "label": "not_entailment"},
    ]
    assert list(answer_pairs(rows)) == [("Who?", "She did.")]


def test_scaling_the_interaction_scales_that_term_alone(backbone_path):
    model = MixEncoder.from_backbone(backbone_path, heads=("ranking", "classification"), num_labels=3, dual_term=True)
    pairs = [("boil water", "the cat sat"), ("undo", "a mat")]

    def scores():
        parts = [model.predict(pairs, score=part, convert_to_tensor=True) for part in ("interaction", "dual")]
        return [*parts, model.predict(pairs, head="classification", convert_to_tensor=True)]

    interaction, dual, classes = scores()
    scale_interaction(model.model, 0.25)
    scaled = scores()
    torch.testing.assert_close(scaled[0], 0.25 * interaction)
    assert torch.equal(scaled[1], dual)
    torch.testing.assert_close(scaled[2], classes)


def test_a_share_is_worth_what_the_scores_rank(tmp_path):
    rows = [{"query": "a", "candidates": ["right", "wrong"], "labels": [1, 0]}]
    task = read_task(write(tmp_path / "dev.jsonl", rows))
    # the dual term is wrong by 1, the interaction right by 1.1
    parts = {"dual": [torch.tensor([0.0, 1.0])], "interaction": [torch.tensor([1.1, 0.0])]}
    found = figures_by_share(task, parts)
    assert {share for share, value in found.items() if value == 1} == {share for share in SHARES if share >= 1}
    assert found[0.0] == pytest.approx(1 / 1.5849625)


def test_a_head_is_trained_on_what_it_reads_and_the_rest_stays(backbone_path, words, monkeypatch):
    monkeypatch.setattr(second_head, "EPOCHS", 60)
    monkeypatch.setattr(second_head, "LEARNING_RATE", 0.01)
    torch.manual_seed(0)
    engine = MixEncoder.from_backbone(
        backbone_path, dual_term=True, heads=["ranking", "classification"], num_labels=2, classifier_dropout=0.0
    )
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    # one word twice, or two words: |q - c| tells them apart
    pairs = [(word, other) for word in words[:8] for other in (word, words[9])]
    examples = [Example(query, (document,), target=float(query == document)) for query, document in pairs]
    inputs = head_inputs(engine, examples, batch_size=5)
    targets = torch.tensor([int(example.target) for example in examples])
    logits = engine.predict(pairs, head="classification", convert_to_tensor=True)
    head = engine.model.classifier
    with torch.no_grad():
        read = head.out_proj(torch.relu(head.dense(inputs)))
    torch.testing.assert_close(read, logits)
    accuracies = train_head(head, inputs, targets, torch.ones(len(pairs)), (inputs, targets))
    assert max(accuracies) == 1.0
    # the scaling of training is part of the weights now
    assert torch.equal(engine.predict(pairs, head="classification", convert_to_tensor=True).argmax(dim=-1), targets)
    after = engine.model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("weight", "bias")
    }


@pytest.mark.parametrize("name", STAGES)
def test_an_equal_dual_encoder_is_trained_by_the_same_stages(name):
    stage = yaml.safe_load((PRETRAINED / name).read_text())
    equal = dual_stage(stage)
    assert TrainConfig(output="out", **equal).architecture == "dual-encoder"
    assert set(equal["config"]) <= {"query_truncation_side", "max_document_length"}
    assert {key: equal[key] for key in stage if key != "config"} == {
        key: stage[key] for key in stage if key != "config"
    }
