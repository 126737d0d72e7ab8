"""Ranking an index on the device of the model: streamed there, or lying there. On a GPU, what a CPU finds."""

import itertools
import threading

import pytest
import torch

from mixencoder import MixEncoder
from tests.conftest import WORDS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TEXTS = [" ".join(words) for words in itertools.product(WORDS, WORDS[::2], WORDS[::3])]
QUERIES = ["how to cook rice", "undo the git commit and boil water in a pot of rice", "paris"]


def build(path, device) -> MixEncoder:
    torch.manual_seed(0)
    return MixEncoder.from_backbone(path, num_context_embeddings=2, dual_term=True, device=device)


def scores_of(rankings) -> torch.Tensor:
    """(B, N) by place."""
    ordered = [sorted(ranking, key=lambda entry: entry["corpus_id"]) for ranking in rankings]
    return torch.tensor([[entry["score"] for entry in ranking] for ranking in ordered])


@pytest.mark.parametrize("device", DEVICES)
def test_a_view_on_a_device_is_ranked_as_the_index_is_and_keeps_its_state(device, backbone_path):
    model = build(backbone_path, device)
    index = model.index(TEXTS, [str(number) for number in range(len(TEXTS))])
    index.remove(["3", "4", "900"])
    view = index.snapshot().to(device)
    assert {array.device.type for shard in view._shards for array in shard.fields.values()} == {device}
    ways = [{}, {"ids": ["7", "2", "500"]}, {"prefilter": None}, {"prefilter": 20}, {"score": "dual"}]
    expected = [model.rank(QUERIES, index, 30, **options) for options in ways]
    best = expected[0][0][0]
    index.remove([best["id"]])
    assert [model.rank(QUERIES, view, 30, **options) for options in ways] == expected
    assert model.rank(QUERIES[0], index, 1)[0]["id"] != best["id"]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["projected", "compact"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("graphs", ["0", "1"])
def test_a_gpu_finds_what_a_cpu_does(backbone_path, layout, precision, graphs, monkeypatch):
    monkeypatch.setenv("MIXENCODER_GRAPHS", graphs)
    rankings = []
    for device in ("cpu", "cuda"):
        model = build(backbone_path, device)
        # more than a piece, streamed
        index = model.index(TEXTS * 5, map(str, range(5 * len(TEXTS))), layout=layout, precision=precision)
        rankings.append(scores_of(model.rank(QUERIES, index)))
        # and again, replayed
        assert torch.equal(scores_of(model.rank(QUERIES, index)), rankings[-1])
    spread = rankings[0].max() - rankings[0].min()
    allowed = {"float32": 1e-4, "float16": 2e-3, "int8": 3e-2}[precision]
    assert (rankings[0] - rankings[1]).abs().max() <= allowed * spread


@pytest.mark.gpu
def test_threads_rank_on_a_gpu_at_once(backbone_path):
    model = build(backbone_path, "cuda")
    index = model.index(TEXTS)
    expected, found = [model.rank(query, index, 5) for query in QUERIES], {}

    def work(number):
        found[number] = [model.rank(QUERIES[number % 3], index, 5) for _ in range(20)]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number, rankings in found.items():
        assert all(ranking == expected[number % 3] for ranking in rankings)
