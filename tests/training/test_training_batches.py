"""Batches: what comes together, and how a batch becomes tensors."""

import pytest
import torch

from mixencoder import MixEncoder
from mixencoder.data.answers import with_known_answers
from mixencoder.data.examples import read_source
from mixencoder.data.sources import Example, Source
from mixencoder.errors import InputError
from mixencoder.training.batches import Collator, ExampleDataset, SourceBatchSampler, TokenInputs


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
    return Collator(TokenInputs(model.read_query, model.read_document, 0), negatives=1, seed=0)


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


def test_what_is_right_for_a_query_in_another_row_is_no_negative_of_it(collator):
    """In whatever row, file or form of a text it stands, in the batch or out of it."""
    rows = [("the cat", "paris"), ("the cat ", "paris is"), ("the dog", " paris"), ("a dog", "rice"), ("a cat", "rice")]
    one = read_source([{"query": query, "positive": document} for query, document in rows])
    other = read_source([{"query": "the dog", "positives": ["water", "rice "], "negatives": ["paris", "pot"]}])
    one, other = with_known_answers([one, other])
    excluded = collator([("ranking", example) for example in one.examples])["excluded"]
    wrong = {(query, rows[column][1]) for query in range(5) for column in range(5) if excluded[query, column]}
    expected = {0: ["paris is", " paris"], 1: ["paris", " paris"], 2: ["paris", "rice"], 3: ["rice"], 4: ["rice"]}
    assert wrong == {(query, document) for query, documents in expected.items() for document in documents}
    assert not excluded.diagonal().any()
    # listed ones too
    assert other.examples[0].negatives == ("pot",)
    lists = own_lists(collator, negatives=4, with_lists=True)([("ranking", example) for example in one.examples])
    width = lists["candidates_per_query"]
    texts = [lists["documents"][i : i + width] for i in range(0, 5 * width, width)]
    for row, (query, _) in enumerate(rows):
        right = {text.strip() for q, text in [*rows, ("the dog", "rice")] if q.strip() == query.strip()}
        counted = [text for text, out in zip(texts[row], lists["excluded"][row], strict=True) if not out]
        assert counted[0].strip() in right
        assert not right & {text.strip() for text in counted[1:]}


def test_scores_that_float32_makes_equal_keep_their_order(collator):
    rows = [Example("a", (word,), target=score) for word, score in (("cat", 16777216.0), ("dog", 16777217.0))]
    targets = collator([("similarity", example) for example in rows])["targets"]
    assert targets[0] < targets[1]


def test_targets_are_the_same_under_another_default_dtype(collator):
    torch.set_default_dtype(torch.float64)
    try:
        batch = collator([("graded", Example("the dog", ("a dog",), ("rice",), grades=(3.0,)))])
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch["targets"].dtype == torch.float32


def test_the_dataset_numbers_examples_across_sources():
    dataset = ExampleDataset([source("a", 3), source("b", 2)])
    assert len(dataset) == 5
    assert dataset[3] == ("ranking", Example("b 0", ("0",)))


def test_processes_share_out_the_batches_of_one(tmp_path):
    sources = [source("a", 40), source("b", 7)]
    options = {"steps": 30, "seed": 3}
    shares = [list(SourceBatchSampler(sources, batch_size=4, process=i, processes=2, **options)) for i in range(2)]
    whole = list(SourceBatchSampler(sources, batch_size=8, **options))
    for first, second, batch in zip(*shares, whole, strict=True):
        assert len(first) == len(second)
        # seven examples are three for each, and one is left out
        assert {*first, *second} <= {*batch} or len(batch) == 7
    with pytest.raises(InputError, match="b has 7 examples for 8 processes"):
        SourceBatchSampler(sources, batch_size=4, processes=8, **options)


def own_lists(collator: Collator, **changes) -> Collator:
    from dataclasses import replace

    return replace(collator, in_batch=False, **changes)


def test_lists_of_their_own_are_filled_up_with_other_queries_documents(collator):
    examples = [
        Example("the dog", ("a dog", "a cat"), ("rice", "water")),
        Example("the cat", ("a cat",)),
        Example("the pot", ("a pot",)),
    ]
    batch = own_lists(collator, negatives=2, with_lists=True)([("ranking", example) for example in examples])
    assert batch["candidates_per_query"] == 3
    documents = [batch["documents"][i : i + 3] for i in range(0, 9, 3)]
    assert documents[0][0] in ("a dog", "a cat")
    assert set(documents[0][1:]) == {"rice", "water"}
    assert documents[2][0] == "a pot"
    assert batch["targets"].tolist() == [0, 0, 0]
    for row, (texts, example) in enumerate(zip(documents, examples, strict=True)):
        for column, text in enumerate(texts):
            # what is no negative is right, or filling
            counts = column == 0 or not batch["excluded"][row, column]
            assert counts == (column == 0 or text not in example.positives)
    assert batch["lists"].tolist() == [[0, 1, 2]] * 3


def test_graded_lists_hold_the_best_document_first_and_mark_what_is_filling(collator):
    examples = [
        Example("the dog", ("a dog", "a cat"), ("rice", "water"), grades=(1.0, 3.0)),
        Example("the pot", ("a pot",), grades=(2.0,)),
    ]
    batch = own_lists(collator, with_lists=True, graded_list=3)([("graded", example) for example in examples])
    assert batch["candidates_per_query"] == 3
    assert batch["documents"][0] == "a cat"
    assert batch["targets"][0, 0] == 3
    assert batch["excluded"].tolist() == [[False] * 3, [False, True, True]]
    known = {"a dog": 1.0, "a cat": 3.0, "rice": 0.0, "water": 0.0}
    assert batch["targets"][0].tolist() == [known[text] for text in batch["documents"][:3]]


def test_a_teacher_gets_the_right_document_own_negatives_and_some_others(collator):
    from dataclasses import replace

    examples = [Example(f"the {word}", (f"a {word}",), ("rice",)) for word in ("dog", "cat", "pot")]
    batch = replace(collator, negatives=2, with_lists=True)([("ranking", example) for example in examples])
    assert batch["candidates_per_query"] is None
    for row, columns in enumerate(batch["lists"].tolist()):
        texts = [batch["documents"][column] for column in columns]
        assert texts[:2] == [examples[row].positives[0], "rice"]
        assert texts[2] in {example.positives[0] for i, example in enumerate(examples) if i != row}
    assert not batch["lists_excluded"].any()
