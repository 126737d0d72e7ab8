"""What labels give on top of stored vectors: the whole measurement, with a tiny encoder and few steps."""

import gzip
import json

from benchmarks.interaction import adapting


def test_every_way_to_adapt_is_trained_and_measured(backbone_path, words, tmp_path, monkeypatch):
    rows = [{"query": f"{word} {words[0]}", "positive": f"{words[-1]} {word}"} for word in words[:12]]
    source = tmp_path / "data" / adapting.DATA
    source.parent.mkdir(parents=True)
    with gzip.open(source, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    # the tiny encoder reads fewer tokens than it could, as the measured one does
    changes = {"MAX_TOKENS": 16, "LABELLED": (6,), "HELD_OUT": 3, "BATCH": 4}
    changes |= {"FROZEN_STEPS": 2, "FINE_TUNING_STEPS": 2, "ROOT": tmp_path}
    for name, value in changes.items():
        monkeypatch.setattr(adapting, name, value)
    folder = tmp_path / "benchmarks" / "results" / "here"
    folder.mkdir(parents=True)
    adapting.main(["--data-dir", str(tmp_path / "data"), "--backbone", str(backbone_path), "--device", "here"])
    record = json.loads((folder / "adapting.json").read_text(encoding="utf-8"))
    found = [(entry["what"], entry["labels"]) for entry in record["records"]]
    ways = ("query adapter alone", "adapter and interaction", "everything")
    assert found == [("cosine", 0), *((way, 6) for way in ways)]
    assert all(0 <= entry[measure] <= 1 for entry in record["records"] for measure in adapting.MEASURES)
