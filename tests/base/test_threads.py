"""The benchmark of threads and busy processes beside it, with made-up times and without models."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from benchmarks.processes import threads
from benchmarks.processes.threads import BATCH, ENCODE, LONGEST, RANK, RIVAL, SHORTEST, busy_processes, mixed_texts
from mixencoder.base.checkpoints.checkpoint import load_tokenizer
from mixencoder.bundled import default_checkpoint

QUIET, NOISY = [1.0, 1.0, 1.1], [1.0, 1.0, 9.0]


def test_texts_have_all_lengths_in_no_order():
    tokenizer = load_tokenizer(default_checkpoint())
    lengths = [len(tokenizer(text)["input_ids"]) for text in mixed_texts(tokenizer, 20, seed=0)]
    assert sorted(lengths) == list(range(SHORTEST, LONGEST + 1, 10))
    assert lengths != sorted(lengths)


def test_busy_processes_compute_while_they_are_wanted_and_no_longer(monkeypatch):
    started, popen = [], threads.subprocess.Popen

    def noted(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(threads.subprocess, "Popen", noted)
    with busy_processes(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Run the benchmark without models; a function gives the samples for each number of threads and busy processes."""
    encoded, now = [], {"busy": 0}
    engine = SimpleNamespace(
        tokenizer=SimpleNamespace(get_vocab=lambda: {"cat": 0, "dog": 1}),
        encode_document=lambda texts: encoded.append(("encode", len(texts))),
        rank=lambda query, texts: encoded.append(("rank", len(texts))),
    )
    rival = SimpleNamespace(encode=lambda texts, **options: encoded.append((options["batch_size"], len(texts))))

    class Busy:
        def __init__(self, count):
            self.count = count

        def __enter__(self):
            now["busy"] = self.count

        def __exit__(self, *exception):
            now["busy"] = 0

    def run(samples, reason=None):
        def take(calls, **options):
            for call in calls.values():
                call()
            return {name: samples(torch.get_num_threads(), now["busy"], name) for name in calls}

        monkeypatch.setattr(threads, "MixEncoder", SimpleNamespace(from_pretrained=lambda: engine))
        monkeypatch.setattr(threads, "rival_encoder", lambda engine: rival)
        monkeypatch.setattr(threads, "rival_unavailable", lambda: reason)
        monkeypatch.setattr(threads, "_version", lambda: "6")
        monkeypatch.setattr(threads, "busy_processes", Busy)
        monkeypatch.setattr(threads, "interleaved_samples", take)
        monkeypatch.setattr(threads, "RESULTS", tmp_path)
        status = threads.main(["--device", "here", "--encoded", "3", "--ranked", "2", "--seconds", "0"])
        path = tmp_path / "here" / "threads.json"
        return status, json.loads(path.read_text()) if path.exists() else None, encoded

    return run


def of(document, what):
    return [(record["threads"], record["busy processes"]) for record in document["records"] if record["what"] == what]


def test_encoding_is_timed_alone_and_beside_others_and_ranking_beside_its_rival(measured):
    before, cores = torch.get_num_threads(), os.cpu_count()
    status, document, encoded = measured(lambda threads, busy, name: [value * (1 + busy) for value in QUIET])
    assert (status, document["refused"], document["skipped"]) == (0, [], [])
    assert of(document, "encoding") == [(1, 0), (1, cores), (2, 0), (2, cores)]
    assert of(document, "ranking") == [(1, 0), (2, 0)]
    assert [list(record["seconds"]) for record in document["records"]] == [[ENCODE]] * 4 + [[RANK, RIVAL]] * 2
    assert document["records"][1]["seconds"] == {ENCODE: 1.0 + cores}
    assert document["records"][-1]["ratio"] == 1.0
    assert set(encoded) == {("encode", 3), ("rank", 2), (BATCH, 2)}
    assert {"command", "started", "commit", "versions", "timing"} <= set(document["provenance"])
    assert torch.get_num_threads() == before


def test_noise_is_refused_alone_and_recorded_beside_others(measured):
    status, document, _ = measured(
        lambda threads, busy, name: NOISY if busy or threads == 2 else QUIET, "not installed"
    )
    assert status == 1
    assert of(document, "encoding") == [(1, 0), (1, os.cpu_count()), (2, os.cpu_count())]
    assert document["records"][1]["spread"] == {ENCODE: 4.0}
    assert [(entry["what"], entry["threads"]) for entry in document["refused"]] == [("encoding", 2), ("ranking", 2)]
    assert all("a spread of 4.00" in entry["reason"] for entry in document["refused"])
    assert document["skipped"] == [{"backend": RIVAL, "reason": "not installed"}]


def test_the_rival_is_the_default_s_backbone_and_the_mean_of_its_tokens():
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed (extra rivals)")
    tokenizer = load_tokenizer(default_checkpoint())
    engine = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(max_document_length=256))
    rival, texts = threads.rival_encoder(engine), mixed_texts(tokenizer, 2, seed=0)
    assert len(rival[0].auto_model.encoder.layer) == 6
    vectors = rival.encode(texts, batch_size=BATCH, show_progress_bar=False, convert_to_tensor=True)
    features = tokenizer(texts[0], return_tensors="pt")
    with torch.inference_mode():
        mean = rival[0].auto_model(**features).last_hidden_state[0].mean(dim=0)
    torch.testing.assert_close(vectors[0], mean, rtol=1e-3, atol=1e-4)
