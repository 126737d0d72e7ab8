"""Trying variants of the interaction: a tiny run from encodings in memory, and what its parts promise."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.interaction import learning
from benchmarks.interaction.encodings import Documents, Lists, Queries
from benchmarks.interaction.features import MINED, SKIPPED, UNSEEN, similar_documents, span_means
from benchmarks.interaction.learning import Batches, learn
from benchmarks.interaction.variants import BASE, VARIANTS

D = 32
"""Of the tiny backbone in tests/conftest.py."""
QUERIES, DOCUMENTS = 6, 24


def lists(seed: int, *, source: bool) -> Lists:
    """Random encodings: query i has documents 4 i to 4 i + 3, of which the first is right; a source also the second."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half()

    lengths = torch.arange(QUERIES) % 3 + 3
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = {layer: random(int(offsets[-1]), D) for layer in (-1, -2)}
    forms = {"mean": random(DOCUMENTS, 1, D), "spans-4": random(DOCUMENTS, 4, D)}
    candidates = [[4 * row + place for place in range(4)] for row in range(QUERIES)]
    grades = [[1, int(source), 0, 0] for _ in range(QUERIES)]
    mined = None
    if source:
        right = [{4 * row, 4 * row + 1} for row in range(QUERIES)]
        means = random(QUERIES, D)
        mined = similar_documents(means, forms["mean"][:, 0], right)
    return Lists(Queries(random(QUERIES, D), tokens, offsets), Documents(forms), candidates, grades, mined)


@pytest.mark.parametrize("name", ["mean-and-spans", "two-layers", "taught-heads"])
def test_a_variant_is_trained_and_measured_at_its_points(backbone_path, monkeypatch, name):
    monkeypatch.setattr(learning, "POINTS", (2,))
    sources = {"first": lists(0, source=True), "ubuntu_irc": lists(1, source=True)}
    sets = {set_name: lists(2 + number, source=False) for number, set_name in enumerate([*UNSEEN, "scifact"])}
    teacher = {source: (torch.randn(QUERIES, 8), torch.randn(DOCUMENTS, 8)) for source in sources}
    variant = replace(VARIANTS[name], steps=4)
    record = learn(str(backbone_path), variant, sources, sets, teacher, seed=0)
    assert set(record["seconds"]) == {"train", "measure"}
    assert [point["steps"] for point in record["points"]] == [2, 4]
    shares = {*map(str, learning.SHARES), "alone"}
    for point in record["points"]:
        assert math.isfinite(point["loss"])
        assert set(point["sets"]) == set(sets)
        assert set(point["unseen"]) == shares | {"chosen on the others"}
        for figures in [*point["sets"].values(), point["unseen"]]:
            assert shares <= set(figures)
            assert all(0 <= figure <= 1 for figure in figures.values())
        # of the dual term alone all shares are the same; the interaction changes the order of some
        changed = {point["unseen"][share] for share in map(str, learning.SHARES)}
        assert (len(changed) == 1) == (not variant.interacts)


def test_the_same_seed_gives_the_same_figures(backbone_path):
    sources = {"first": lists(0, source=True)}
    sets = {name: lists(2 + number, source=False) for number, name in enumerate([*UNSEEN, "scifact"])}
    first, second = (
        learn(str(backbone_path), replace(VARIANTS["mined"], steps=2), sources, sets, None, seed=3) for _ in range(2)
    )
    assert first["points"] == second["points"]


def test_the_share_of_each_pair_is_learned_last_and_on_sources_of_its_own(backbone_path, monkeypatch):
    monkeypatch.setattr(learning, "SHARE_STEPS", 3)
    sources = {"first": lists(0, source=True), "qnli": lists(1, source=True)}
    sets = {name: lists(2 + number, source=False) for number, name in enumerate([*UNSEEN, "scifact"])}
    drawn, batches = [], learning.Batches

    def watched(found, variant, seed):
        drawn.append(set(found))
        return batches(found, variant, seed)

    monkeypatch.setattr(learning, "Batches", watched)
    gated = learn(str(backbone_path), replace(VARIANTS["gated"], steps=2), sources, sets, None, seed=3)
    assert drawn == [{"first"}, {"qnli"}]
    plain = learn(str(backbone_path), replace(VARIANTS["mined"], steps=2), {"first": sources["first"]}, sets, None, 3)
    # the share changes the full score, and neither the dual term nor how the rest was trained
    before, after = plain["points"][-1]["unseen"], gated["points"][-1]["unseen"]
    assert before["0.0"] == after["0.0"]


@pytest.mark.parametrize(("mined", "others"), [(2, 3), (0, 4), (5, 0)])
@pytest.mark.parametrize("name", ["first", "ubuntu_irc"])
def test_batches_exclude_right_documents_and_no_others(name, mined, others):
    source = lists(0, source=True)
    # every second query shares the first one's right documents
    for row in range(0, QUERIES, 2):
        source.candidates[row] = source.candidates[0]
    batches = Batches({name: source}, replace(BASE, mined=mined, others=others), seed=0)
    for _ in range(20):
        found, rows, columns, excluded = batches()
        assert found is source
        assert sorted(rows) == list(range(QUERIES))
        assert columns.shape == excluded.shape == (QUERIES, 1 + mined + others)
        for row, listed, marks in zip(rows, columns.tolist(), excluded.tolist(), strict=True):
            right = set(source.candidates[row][:2])
            assert listed[0] in right
            assert marks == [False, *(number in right for number in listed[1:])]


def test_similar_documents_are_never_right_ones_and_skip_the_most_similar():
    documents = torch.eye(20)
    # the later a document, the more similar
    query = torch.arange(1.0, 21.0)
    first, second = similar_documents(torch.stack([query, query]), documents, [set(), {19, 17}]).tolist()
    assert first == [19 - SKIPPED - place for place in range(MINED)]
    expected = [number for number in range(19, -1, -1) if number not in (19, 17)][SKIPPED:]
    assert second == expected[:MINED]


def test_a_source_with_few_documents_repeats_its_similar_ones():
    (found,) = similar_documents(torch.randn(1, D), torch.randn(5, D), [{0, 3}]).tolist()
    assert len(found) == MINED
    assert not {0, 3} & set(found)
    assert len(set(found)) == 5 - 2 - SKIPPED


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_spans_cover_a_text_and_repeat_tokens_of_a_short_one(n):
    tokens = torch.arange(float(n)).unsqueeze(1)
    found = span_means(tokens, 4).flatten().tolist()
    assert len(found) == 4
    assert found == sorted(found)
    if n <= 4:
        # single tokens, and none is left out
        assert set(found) == set(range(n))
    assert span_means(torch.arange(8.0).unsqueeze(1), 4).flatten().tolist() == [0.5, 2.5, 4.5, 6.5]
