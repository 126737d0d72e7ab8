"""The Hugging Face hub: options of downloads, uploads with a stub of the hub, the model card, and foreign folders."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi

from mixencoder import CheckpointError, InputError, MixEncoder
from mixencoder.architectures import load_engine
from mixencoder.base.checkpoints import locations
from mixencoder.peers import CrossEncoder, DualEncoder
from mixencoder.training.run import TrainConfig, train

TEXTS = ["boil the rice", "undo the commit"]


def in_cache(cache: Path, source: Path, *, commit: str, revision: str, subfolder: str = "") -> None:
    """Put a checkpoint where an earlier download would be."""
    place = cache / "models--somebody--something"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)
    shutil.copytree(source, place / "snapshots" / commit / subfolder)


class TestDownloads:
    @pytest.mark.parametrize("load", [MixEncoder.from_pretrained, load_engine])
    def test_a_revision_in_a_cache_folder_is_loaded_without_the_hub(self, checkpoint, tmp_path, load):
        in_cache(tmp_path, Path(checkpoint), commit="abc", revision="main")
        other = MixEncoder.from_pretrained(checkpoint)
        with torch.no_grad():
            other.model.dual_scale.mul_(2)
        other.save_pretrained(tmp_path / "other")
        in_cache(tmp_path, tmp_path / "other", commit="def", revision="v2")
        options = {"cache_dir": tmp_path, "local_files_only": True}
        pair = ("rice", TEXTS[0])
        assert load("somebody/something", **options).predict(pair) == MixEncoder.from_pretrained(checkpoint).predict(
            pair
        )
        second = load("somebody/something", revision="v2", **options)
        assert second.predict(pair) == other.predict(pair)
        # not a folder of the cache
        assert second.model.name_or_path == "somebody/something"

    def test_what_was_not_downloaded_is_said(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no earlier download of it with these options.*local_files_only"):
            MixEncoder.from_pretrained("somebody/something", cache_dir=tmp_path, local_files_only=True)

    def test_the_hub_is_asked_with_the_options(self, checkpoint, tmp_path, monkeypatch):
        asked = {}

        def download(hub_id, **options):
            asked.update(options, hub_id=hub_id)
            shutil.copytree(checkpoint, tmp_path / "down" / "small", dirs_exist_ok=True)
            return str(tmp_path / "down")

        monkeypatch.setattr(locations, "snapshot_download", download)
        options = {"revision": "v1", "token": "secret", "cache_dir": tmp_path, "subfolder": "small"}
        MixEncoder.from_pretrained("somebody/something", **options)
        assert asked["hub_id"] == "somebody/something"
        assert {name: asked[name] for name in ("revision", "token", "cache_dir", "local_files_only")} == {
            "revision": "v1",
            "token": "secret",
            "cache_dir": tmp_path,
            "local_files_only": False,
        }
        assert asked["allow_patterns"]
        assert all(pattern.startswith("small/") for pattern in asked["allow_patterns"])
        # a token is never shown
        assert "secret" not in repr(locations.HubOptions(token="secret"))

    def test_a_subfolder_of_a_folder_is_loaded(self, checkpoint, backbone_path, tmp_path):
        shutil.copytree(checkpoint, tmp_path / "both" / "small")
        shutil.copytree(backbone_path, tmp_path / "both" / "encoder")
        assert MixEncoder.from_pretrained(tmp_path / "both", subfolder="small").rank("rice", TEXTS)
        assert MixEncoder.from_backbone(tmp_path / "both", subfolder="encoder").rank("rice", TEXTS)
        assert DualEncoder.from_backbone(tmp_path / "both", subfolder="encoder").rank("rice", TEXTS)
        assert MixEncoder.from_vectors(tmp_path / "both", subfolder="encoder").rank("rice", TEXTS)
        with pytest.raises(CheckpointError, match="holds no folder 'large'"):
            MixEncoder.from_pretrained(tmp_path / "both", subfolder="large")
        for outside in ("../both/small", "/etc"):
            with pytest.raises(InputError, match="expected a folder below"):
                MixEncoder.from_pretrained(tmp_path / "both", subfolder=outside)


class Hub:
    """Stands in for the hub's calls, and notes them."""

    def __init__(self, *, has_card: bool = False) -> None:
        self.calls, self.has_card, self.files = [], has_card, {}

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def file_exists(self, repo_id, filename, **options):
        return self.has_card

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options["repo_id"], options))
        self.files = {path.name: path.read_bytes() for path in Path(options["folder_path"]).iterdir()}
        return SimpleNamespace(commit_url="https://hub/commit/1", pr_url=None)


def forwarded(stub: Hub, name: str):
    # looked up at each call, so that a test may replace one
    return lambda self, *args, **options: getattr(stub, name)(*args, **options)


@pytest.fixture
def hub(monkeypatch):
    stub = Hub()
    for name in ("create_repo", "create_branch", "file_exists", "upload_folder"):
        monkeypatch.setattr(HfApi, name, forwarded(stub, name))
    return stub


class TestUploads:
    def test_the_saved_model_is_uploaded(self, checkpoint, hub):
        model = MixEncoder.from_pretrained(checkpoint)
        address = model.push_to_hub("somebody/new", private=True, revision="v1", commit_message="First")
        assert address == "https://hub/commit/1"
        created, branch, uploaded = hub.calls
        assert created == ("create_repo", "somebody/new", {"private": True, "exist_ok": False})
        assert branch == ("create_branch", "somebody/new", {"branch": "v1", "exist_ok": True})
        assert uploaded[2]["commit_message"] == "First"
        assert uploaded[2]["revision"] == "v1"
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(hub.files)
        assert "name_or_path" not in json.loads(hub.files["config.json"])

    def test_a_card_in_the_repository_is_kept_unless_it_is_to_be_replaced(self, checkpoint, hub):
        model = MixEncoder.from_pretrained(checkpoint)
        hub.has_card = True
        model.push_to_hub("somebody/old", exist_ok=True)
        assert hub.calls[-1][2]["ignore_patterns"] == ["README.md"]
        model.push_to_hub("somebody/old", exist_ok=True, replace_model_card=True)
        assert hub.calls[-1][2]["ignore_patterns"] == []

    def test_a_folder_is_uploaded_as_it_is(self, checkpoint, hub, tmp_path):
        model = MixEncoder.from_pretrained(checkpoint)
        model.push_to_hub("somebody/new", folder=checkpoint)
        assert hub.calls[-1][2]["folder_path"] == Path(checkpoint)
        assert "*.json" in hub.calls[-1][2]["allow_patterns"]
        with pytest.raises(CheckpointError, match=r"holds no config\.json"):
            model.push_to_hub("somebody/new", folder=tmp_path)

    def test_what_the_hub_refuses_is_one_line(self, checkpoint, hub):
        def refuse(*args, **options):
            raise OSError("403 Forbidden\nmore lines")

        hub.create_repo = refuse
        with pytest.raises(CheckpointError, match=r"somebody/new could not be uploaded.*403 Forbidden$"):
            MixEncoder.from_pretrained(checkpoint).push_to_hub("somebody/new")


class TestCard:
    def test_a_card_says_what_the_model_is(self, backbone_path, tmp_path):
        engine = MixEncoder.from_backbone(
            backbone_path, num_context_embeddings=2, heads=("ranking",), max_document_length=30
        )
        engine.save_pretrained(tmp_path / "own")
        card = (tmp_path / "own" / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nlibrary_name: mixencoder\npipeline_tag: text-ranking\n---\n")
        assert "| num context embeddings | 2 |" in card
        assert "| max document length | 30 tokens |" in card
        assert f"| parameters | {sum(p.numel() for p in engine.model.parameters()):,} |" in card
        assert "no record of a training run" in card
        assert str(backbone_path) not in card
        CrossEncoder.from_backbone(backbone_path, num_labels=3).save_pretrained(tmp_path / "cross")
        card = (tmp_path / "cross" / "README.md").read_text(encoding="utf-8")
        assert "pipeline_tag: text-classification" in card
        assert "from mixencoder.peers import CrossEncoder" in card

    def test_a_card_of_someone_else_is_kept_and_our_own_is_renewed(self, backbone_path, tmp_path):
        place = tmp_path / "own"
        MixEncoder.from_backbone(backbone_path).save_pretrained(place)
        MixEncoder.from_backbone(backbone_path, num_context_embeddings=4).save_pretrained(place)
        assert "| num context embeddings | 4 |" in (place / "README.md").read_text(encoding="utf-8")
        (place / "README.md").write_text("mine")
        MixEncoder.from_backbone(backbone_path).save_pretrained(place)
        assert (place / "README.md").read_text() == "mine"

    def test_a_trained_model_has_its_run_on_its_card(self, backbone_path, tmp_path):
        data = tmp_path / "pairs|odd.jsonl"
        rows = [{"query": "how to cook rice", "positive": "boil water"}, {"query": "undo git", "positive": "commit"}]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        train(
            TrainConfig(
                data=[str(data)], output=str(tmp_path / "out"), backbone=str(backbone_path), steps=2, batch_size=2
            )
        )
        card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        assert "| pairs\\|odd | 1.0 | 2 |" in card
        assert "| steps | 2 |" in card
        assert "| version of torch |" in card
        assert str(tmp_path) not in card


class TestForeignFolders:
    def test_a_model_of_sentence_transformers_says_what_to_do(self, encoder):
        (encoder / "modules.json").write_text(json.dumps([{"type": "a.Transformer", "path": ""}]))
        with pytest.raises(
            CheckpointError, match=r"a sentence-transformers model.*MixEncoder\.from_backbone.*dual_term=True"
        ):
            MixEncoder.from_pretrained(encoder)
        with pytest.raises(CheckpointError, match=r"use DualEncoder\.from_backbone$"):
            DualEncoder.from_pretrained(encoder)

    def test_a_cross_encoder_says_what_to_do(self, encoder):
        fields = json.loads((encoder / "config.json").read_text())
        (encoder / "config.json").write_text(json.dumps({**fields, "architectures": ["BertForSequenceClassification"]}))
        with pytest.raises(CheckpointError, match=r"a cross-encoder or classifier.*without its head"):
            MixEncoder.from_pretrained(encoder)
        # and that works
        assert MixEncoder.from_backbone(encoder).rank("rice", TEXTS)

    def test_a_cross_encoder_in_its_newer_form_says_so_too(self, encoder):
        (encoder / "modules.json").write_text(json.dumps([{"type": "a.Transformer", "path": ""}]))
        (encoder / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "CrossEncoder"}))
        with pytest.raises(CheckpointError, match=r"a cross-encoder or classifier"):
            MixEncoder.from_pretrained(encoder)

    def test_a_plain_encoder_says_what_to_do(self, encoder):
        with pytest.raises(CheckpointError, match=r'of type "bert".*use MixEncoder\.from_backbone$'):
            MixEncoder.from_pretrained(encoder)
