"""Training data, losses and the trainer: what is read, what is learned, what stops a run."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch

from mixencoder import MixEncoder
from mixencoder.errors import DataError, InputError, NonFiniteError
from mixencoder.training.data import Collator, Example, ExampleDataset, Source, SourceBatchSampler, read_source
from mixencoder.training.losses import ranking_loss, similarity_loss
from mixencoder.training.trainer import TrainConfig, train


def write(path: Path, rows: list[dict]) -> Path:
    text = "\n".join(json.dumps(row) for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def write_beir(folder: Path) -> Path:
    folder.mkdir()
    write(folder / "corpus.jsonl.gz", [{"_id": f"d{i}", "title": f"title {i}", "text": f"text {i}"} for i in range(4)])
    write(folder / "queries.train.jsonl", [{"_id": "q1", "text": "a question"}])
    (folder / "qrels.train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\n")
    (folder / "bm25.train.run").write_text("q1 Q0 d0 1 3.0 bm25\nq1 Q0 d2 2 2.0 bm25\nq1 Q0 d3 3 2.5 bm25\n")
    return folder


def test_every_shape_is_read(tmp_path):
    pair = read_source(write(tmp_path / "pair.jsonl.gz", [{"query": "q", "positive": "p"}]), weight=2.0)
    assert (pair.name, pair.task, pair.weight) == ("pair", "ranking", 2.0)
    assert pair.examples == [Example("q", ("p",))]
    multi = read_source(write(tmp_path / "multi.jsonl", [{"query": "q", "positives": ["p", " ", "r"]}]))
    assert multi.examples == [Example("q", ("p", "r"))]
    rows = [{"query": "q", "candidates": ["n", "p", "", "g"], "labels": [0, 1, 0, 0.5]}]
    rank = read_source(write(tmp_path / "rank.jsonl", rows))
    assert rank.examples == [Example("q", ("p", "g"), ("n",))]
    rows = [{"premise": "a", "hypothesis": "b", "label": "neutral"}]
    nli = read_source(write(tmp_path / "nli.jsonl", rows), label2id={"entailment": 0, "neutral": 1})
    assert (nli.task, nli.examples) == ("classification", [Example("a", ("b",), target=1)])
    sts = read_source(write(tmp_path / "sts.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 3.5}]))
    assert (sts.task, sts.examples[0].target) == ("similarity", 3.5)
    beir = read_source(write_beir(tmp_path / "beir"))
    # the run is read by its scores, best first
    assert beir.examples == [Example("a question", ("title 2 text 2",), ("title 0 text 0", "title 3 text 3"))]


def test_lists_without_a_right_candidate_are_left_out_and_counted_once(tmp_path, caplog):
    rows = [{"query": "q", "candidates": ["a", "b"], "labels": labels} for labels in ([0, 0], [0, 1], [0, 0])]
    source = read_source(write(tmp_path / "rank.jsonl", rows))
    assert len(source.examples) == 1
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'rank.jsonl'}: 2 of 3 rows have no right candidate and are left out"
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a"}], "line 1: fields are text; expected query, positive or query, positives or"),
        ([{"query": "q", "positive": "p"}, {"query": "q"}], "line 2: fields are query; expected query, positive"),
        ([{"query": 1, "positive": "p"}], "line 1: query is a int; expected a string"),
        ([{"query": "q", "positives": "p"}], "line 1: positives is a str; expected a list"),
        ([{"query": "q", "candidates": ["a"], "labels": [1, 0]}], "line 1: 1 candidates but 2 labels"),
        ([{"query": "q", "candidates": ["a"], "labels": ["x"]}], "line 1: labels are"),
        ([{"premise": "a", "hypothesis": "b", "label": "maybe"}], "label is 'maybe'; expected one of no, yes"),
        ([{"sentence1": "a", "sentence2": "b", "score": "high"}], "score is 'high'; expected a number"),
        ([{"query": "q", "candidates": ["a"], "labels": [0]}], "holds no usable example"),
        ([], "holds no usable example"),
    ],
)
def test_a_wrong_file_names_file_line_found_and_expected(tmp_path, rows, words):
    path = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError) as caught:
        read_source(path, label2id={"no": 0, "yes": 1})
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_files_that_are_no_json_or_no_utf8(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"query": "q", "positive": "p"}\n{"query"\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_source(path)
    path.write_bytes(b'{"query": "q", "positive": "p"}\n{"query": "\xe9"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_source(path)
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_source(tmp_path / "nothing.jsonl")
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"query": "q", "positive": "p"}\n' * 100)[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        read_source(path)


def test_labelled_pairs_need_a_classification_head(tmp_path):
    path = write(tmp_path / "nli.jsonl", [{"premise": "a", "hypothesis": "b", "label": "x"}])
    with pytest.raises(DataError, match="need a classification head"):
        read_source(path)


def source(name: str, count: int, weight: float = 1.0) -> Source:
    return Source(name, "ranking", [Example(f"{name} {i}" + " x" * (i % 7), (f"{i}",)) for i in range(count)], weight)


def test_batches_come_from_one_source_by_weight_and_repeat_with_the_seed():
    sources = [source("a", 100, 3.0), source("b", 10, 1.0)]
    batches = list(SourceBatchSampler(sources, batch_size=16, steps=400, seed=5))
    assert len(batches) == 400
    assert all(len({index >= 100 for index in batch}) == 1 for batch in batches)
    from_b = [batch for batch in batches if batch[0] >= 100]
    assert 60 < len(from_b) < 140
    assert all(len(batch) == 10 for batch in from_b)
    assert batches == list(SourceBatchSampler(sources, batch_size=16, steps=400, seed=5))
    assert batches != list(SourceBatchSampler(sources, batch_size=16, steps=400, seed=6))


def test_every_example_comes_once_before_any_comes_twice():
    (batches,) = [list(SourceBatchSampler([source("a", 64)], batch_size=8, steps=8, seed=0))]
    assert sorted(index for batch in batches for index in batch) == list(range(64))


@pytest.fixture
def collator(backbone_path) -> Collator:
    model = MixEncoder.from_backbone(backbone_path)
    return Collator(model.read_query, model.read_document, 0, negatives=1, seed=0)


def test_ranking_batches_hold_right_documents_then_listed_negatives(collator):
    examples = [
        Example("the dog", ("a dog", "a cat"), ("rice", "water")),
        Example("the cat", ("a cat",)),
    ]
    batch = collator([("ranking", example) for example in examples])
    assert batch["task"] == "ranking"
    assert batch["targets"].tolist() == [0, 1]
    assert batch["document_input_ids"].shape[0] == 3
    drawn_cat_first = torch.equal(batch["document_input_ids"][0], batch["document_input_ids"][1])
    # "a cat" is also right for the first query, so it must not serve as its negative
    assert batch["excluded"].tolist() == [[False, True, False], [drawn_cat_first, False, False]]
    again = collator([("ranking", example) for example in examples])
    assert torch.equal(batch["document_input_ids"], again["document_input_ids"])


def test_ranking_loss_is_cross_entropy_over_what_is_not_excluded():
    scores = torch.tensor([[1.0, 5.0, 0.0], [0.0, 2.0, 1.0]])
    excluded = torch.tensor([[False, True, False], [False, False, False]])
    by_hand = -(torch.log_softmax(scores[0, [0, 2]], 0)[0] + torch.log_softmax(scores[1], 0)[1]) / 2
    torch.testing.assert_close(ranking_loss(scores, torch.tensor([0, 1]), excluded), by_hand)


def test_similarity_loss_asks_for_the_order_alone():
    targets = torch.tensor([5.0, 1.0, 1.0])
    right, wrong = torch.tensor([4.0, -4.0, -5.0]), torch.tensor([-4.0, 4.0, 5.0])
    assert similarity_loss(right, targets) < 0.01 < 5 < similarity_loss(wrong, targets)
    by_hand = torch.log(1 + torch.exp(wrong[1] - wrong[0]) + torch.exp(wrong[2] - wrong[0]))
    torch.testing.assert_close(similarity_loss(wrong, targets), by_hand)
    assert similarity_loss(right, torch.ones(3)) == 0


def same_word_pairs(words: list[str], count: int) -> list[dict]:
    chance = random.Random(0)
    noise = words[:6]
    content = words[6:]
    rows = []
    for _ in range(count):
        word = chance.choice(content)
        rows.append({"query": f"{chance.choice(noise)} {word}", "positive": f"{word} {chance.choice(noise)}"})
    return rows


def accuracy(model: MixEncoder, words: list[str]) -> float:
    content = words[6:]
    documents = [f"{word} the" for word in content]
    rankings = model.rank([f"how {word}" for word in content], documents, top_k=1)
    return sum(ranking[0]["corpus_id"] == i for i, ranking in enumerate(rankings)) / len(content)


@pytest.mark.parametrize("dual_term", [False, True], ids=["published", "dual"])
def test_it_learns_a_synthetic_relation(tmp_path, tokenizer, words, dual_term):
    from conftest import backbone_config
    from transformers import BertModel

    torch.manual_seed(0)
    BertModel(backbone_config(num_hidden_layers=2, initializer_range=0.1), add_pooling_layer=False).save_pretrained(
        tmp_path / "backbone"
    )
    tokenizer.save_pretrained(tmp_path / "backbone")
    data = write(tmp_path / "pairs.jsonl", same_word_pairs(words, 400))
    output = tmp_path / "out"
    train(
        TrainConfig(
            output=str(output),
            data=[str(data)],
            backbone=str(tmp_path / "backbone"),
            config={"dual_term": dual_term},
            steps=300,
            batch_size=8,
            learning_rate=1e-3,
            interaction_learning_rate=1e-3,
            freeze_embeddings=False,
        )
    )
    # from the file, not from memory; 1 of 16 is chance
    assert accuracy(MixEncoder.from_pretrained(output), words) >= 0.9


def test_classification_and_similarity_train_beside_ranking(tmp_path, backbone_path, words):
    ranking = write(tmp_path / "pairs.jsonl", same_word_pairs(words, 40))
    nli = write(
        tmp_path / "nli.jsonl",
        [{"premise": f"the {w}", "hypothesis": w, "label": ["yes", "no"][i % 2]} for i, w in enumerate(words)],
    )
    sts = write(
        tmp_path / "sts.jsonl",
        [{"sentence1": w, "sentence2": f"a {w}", "score": float(i)} for i, w in enumerate(words)],
    )
    config = {"heads": ["ranking", "classification"], "num_labels": 2, "label2id": {"no": 0, "yes": 1}}
    config["id2label"] = {0: "no", 1: "yes"}
    before = MixEncoder.from_backbone(backbone_path, **config).model.state_dict()
    engine = train(
        TrainConfig(
            output=str(tmp_path / "out"),
            data=[f"{ranking}=2", str(nli), str(sts)],
            backbone=str(backbone_path),
            config=config,
            steps=12,
            batch_size=8,
        )
    )
    assert engine.predict([("the cat", "cat")], head="classification").shape == (1, 2)
    after = engine.model.state_dict()
    changed = {name for name in before if name.startswith("backbone") and not torch.equal(before[name], after[name])}
    assert any("layer" in name for name in changed)
    # frozen by default
    assert not any("embeddings" in name for name in changed)


def options(tmp_path, backbone_path, words, **changes) -> TrainConfig:
    data = write(tmp_path / "pairs.jsonl", same_word_pairs(words, 40))
    fields = {"output": str(tmp_path / "out"), "data": [str(data)], "backbone": str(backbone_path), "steps": 3}
    return TrainConfig(**{**fields, **changes})


def test_the_same_seed_trains_the_same_model(tmp_path, backbone_path, words):
    models = [
        train(options(tmp_path, backbone_path, words, output=str(tmp_path / f"out{i}"), seed=seed)).model.state_dict()
        for i, seed in enumerate((1, 1, 2))
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not all(torch.equal(models[0][name], models[2][name]) for name in models[0])


def test_what_cannot_be_trained_is_found_before_training(tmp_path, backbone_path, words):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    cases = [
        ({"output": str(full)}, InputError, "exists and is not empty"),
        ({"backbone": None}, InputError, "either a model to go on from or a backbone"),
        ({"model": "x"}, InputError, "not both"),
        ({"data": []}, DataError, "no training data was named"),
        ({"data": ["x=high"]}, InputError, "weight of x is 'high'"),
        ({"data": ["x=-1"]}, InputError, "weight of x is -1.0; expected a positive"),
        ({"steps": 0}, InputError, "steps is 0"),
        ({"config": {"num_context_embeddings": 99}}, InputError, "num_context_embeddings is 99"),
        ({"config": {"heads": ["classification"]}}, DataError, "need a ranking head"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            train(options(tmp_path, backbone_path, words, **changes))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path, backbone_path, words, monkeypatch):
    monkeypatch.setattr("mixencoder.training.trainer.ranking_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step 0 \(ranking\); nothing is saved"):
        train(options(tmp_path, backbone_path, words))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_dataset_numbers_examples_across_sources():
    dataset = ExampleDataset([source("a", 3), source("b", 2)])
    assert len(dataset) == 5
    assert dataset[3] == ("ranking", Example("b 0", ("0",)))
