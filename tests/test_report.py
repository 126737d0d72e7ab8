"""The numbers of README and model card are the committed results' numbers."""

import json

import pytest

from benchmarks.report import DOCUMENTS, RESULTS, rendered


@pytest.mark.parametrize("path", list(DOCUMENTS), ids=lambda path: path.parent.name + "/" + path.name)
def test_a_document_holds_what_the_results_say(path):
    text = path.read_text(encoding="utf-8")
    assert rendered(text, DOCUMENTS[path]) == text


@pytest.mark.parametrize("name", ["candidate_attention", "training_step"])
def test_every_benchmark_record_is_a_claim_with_its_rival_and_its_limit(name):
    (path,) = RESULTS.glob(f"*/{name}.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"torch", "threads", "cpu_capability"} <= set(result["machine_info"])
    assert "node" not in result["machine_info"]
    assert result["commit_info"]["id"]
    keys = {
        "shape",
        "dtype",
        "device",
        "backend",
        "bytes",
        "flops",
        "fraction_of_limit",
        "peak_bytes",
        "rival",
        "ratio",
    }
    assert all(keys <= set(record["extra_info"]) for record in result["benchmarks"])
