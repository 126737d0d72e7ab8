"""Names of checkpoints: folders, hub ids, and what loading prints: advice on classes, no bars of other libraries."""

import logging
import shutil

import pytest
from transformers import BertModel
from transformers.utils import logging as transformers_logging

from mixencoder import MixEncoder
from mixencoder.base.checkpoints.checkpoint import load_tokenizer
from mixencoder.bundled import default_checkpoint
from mixencoder.errors import CheckpointError, InputError
from mixencoder.peers import CrossEncoder

TEXTS = ["boil the rice", "undo the commit"]


class TestNames:
    def test_another_architecture_says_which_class_loads_it(self, dual, checkpoint, encoder):
        with pytest.raises(
            CheckpointError, match=r'"mixencoder-dual-encoder"; .*Load it with DualEncoder\.from_pretrained'
        ):
            MixEncoder.from_pretrained(dual)
        with pytest.raises(CheckpointError, match=r"Load it with MixEncoder\.from_pretrained"):
            CrossEncoder.from_pretrained(checkpoint)
        with pytest.raises(CheckpointError, match=r'"bert"; .*use CrossEncoder\.from_backbone'):
            CrossEncoder.from_pretrained(encoder)

    def test_a_peer_without_a_name_says_that_none_is_bundled(self):
        with pytest.raises(InputError, match=r"bundles no CrossEncoder; .*CrossEncoder\.from_backbone"):
            CrossEncoder.from_pretrained()

    @pytest.mark.parametrize("load", [MixEncoder.from_pretrained, MixEncoder.from_backbone, load_tokenizer])
    def test_a_name_that_is_no_folder_and_not_on_the_hub_gives_one_line(self, load, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        expected = r'no folder "somebody/something".*looked up on the Hugging Face hub.*not be reached.*name its folder'
        with pytest.raises(CheckpointError, match=expected) as caught:
            load("somebody/something")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "name",
        [
            "no/such/folder",
            "./nothing",
            "nothing",
            "~/no such folder",
            "-a/b",
            "a/b/",
            "~nobody-here/b",
            "a\0b",
            "a" * 300,
        ],
    )
    def test_a_name_that_cannot_be_a_hub_id_is_reported_as_no_folder(self, name):
        with pytest.raises(CheckpointError, match=r"is not a directory|cannot name a directory"):
            MixEncoder.from_pretrained(name)

    def test_a_model_of_the_hub_is_read_from_the_cache(self, encoder, tmp_path, monkeypatch):
        place = tmp_path / "hub" / "models--somebody--something"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("abc")
        shutil.copytree(encoder, place / "snapshots" / "abc")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)
        engine = MixEncoder.from_backbone("somebody/something")
        assert engine.rank("rice", TEXTS, top_k=1)

    def test_a_tilde_is_the_home_folder(self, encoder, monkeypatch):
        monkeypatch.setenv("HOME", str(encoder.parent))
        engine = MixEncoder.from_backbone("~/encoder", dual_term=True)
        engine.save_pretrained("~/saved")
        assert (encoder.parent / "saved" / "model.safetensors").is_file()
        found = MixEncoder.from_pretrained("~/saved")
        assert found.predict([("rice", "boil")]) == engine.predict([("rice", "boil")])
        assert '"saved"' in found.identity.name


class TestQuiet:
    @pytest.fixture(autouse=True)
    def bars(self):
        before = transformers_logging.is_progress_bar_enabled()
        transformers_logging.enable_progress_bar()
        yield
        (transformers_logging.enable_progress_bar if before else transformers_logging.disable_progress_bar)()

    def test_nothing_is_shown_by_default_and_other_loads_show_what_they_did(
        self, checkpoint, backbone_path, capfd, caplog
    ):
        MixEncoder.from_pretrained(checkpoint)
        engine = MixEncoder.from_backbone(backbone_path)
        assert capfd.readouterr() == ("", "")
        assert not caplog.records
        BertModel.from_pretrained(backbone_path)
        # transformers' own load shows a bar, and reports the missing pooler
        assert "Loading weights" in capfd.readouterr().err
        assert "LOAD REPORT" in caplog.text
        assert engine.rank("rice", TEXTS, top_k=1)

    def test_bars_that_were_off_stay_off(self, checkpoint, backbone_path, capfd):
        transformers_logging.disable_progress_bar()
        MixEncoder.from_pretrained(checkpoint)
        assert not transformers_logging.is_progress_bar_enabled()

    def test_bars_are_shown_where_the_library_shows_its_own(self, checkpoint, capfd, caplog):
        caplog.set_level(logging.INFO, logger="mixencoder")
        MixEncoder.from_pretrained(checkpoint)
        assert "Loading weights" in capfd.readouterr().err


def test_the_bundled_checkpoint_loads_without_a_warning(recwarn, caplog, capfd):
    MixEncoder.from_pretrained()
    assert not list(recwarn)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert load_tokenizer(default_checkpoint())("boil the rice")["input_ids"] == [101, 26077, 1996, 5785, 102]
