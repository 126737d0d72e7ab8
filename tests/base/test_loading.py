"""Untrusted checkpoints: read whole or refused in one line, without running code or allocating much memory."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertForMaskedLM

from mixencoder import MixEncoder
from mixencoder.architectures import load_engine
from mixencoder.base.backbones import SUPPORTED, build_backbone
from mixencoder.base.checkpoints.checkpoint import load_backbone, load_model, load_tokenizer
from mixencoder.errors import CheckpointError, MixEncoderError
from mixencoder.modeling import MixEncoderModel
from mixencoder.peers import CrossEncoder
from tests.conftest import backbone_config

TEXTS = ["boil the rice", "undo the commit"]


def change_weights(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})


def change_fields(folder: Path, name: str = "config.json", **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def prefixed(prefix: str) -> Callable[[dict], dict]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


class TestWeights:
    @pytest.mark.parametrize("prefix", ["model.", "module.bert.", "0.auto_model."])
    def test_a_prefix_of_every_name_is_removed(self, encoder, backbone_path, prefix):
        change_weights(encoder, prefixed(prefix))
        found, want = load_backbone(encoder).state_dict(), load_backbone(backbone_path).state_dict()
        assert all(torch.equal(found[name], want[name]) for name in want)

    def test_names_of_old_norms_are_read(self, encoder, backbone_path):
        def old(name: str) -> str:
            return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

        change_weights(encoder, lambda weights: {old(name): tensor for name, tensor in weights.items()})
        found, want = load_backbone(encoder).state_dict(), load_backbone(backbone_path).state_dict()
        assert all(torch.equal(found[name], want[name]) for name in want)

    def test_heads_and_poolers_may_be_left_over(self, tokenizer, tmp_path):
        model = BertForMaskedLM(backbone_config())
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        change_weights(tmp_path, lambda weights: {**weights, "bert.pooler.dense.weight": torch.zeros(32, 32)})
        found = load_backbone(tmp_path).state_dict()
        assert torch.equal(
            found["encoder.layer.2.output.dense.weight"], model.bert.encoder.layer[2].output.dense.weight
        )

    @pytest.mark.parametrize("kind", SUPPORTED)
    def test_every_kind_of_encoder_is_read_whole_from_a_model_with_other_parts(self, kind, tmp_path):
        torch.manual_seed(0)
        AutoModel.from_config(backbone_config(kind)).save_pretrained(tmp_path)
        found, stored = load_backbone(tmp_path).state_dict(), load_file(tmp_path / "model.safetensors")
        assert set(found) == set(build_backbone(backbone_config(kind)).state_dict())
        assert all(torch.equal(found[name], stored[name]) for name in found)

    @pytest.mark.parametrize("kind", ["encoder", "own", "dual"])
    def test_left_out_layers_are_counted_and_named(self, request, kind):
        folder = request.getfixturevalue(kind)
        change_weights(folder, lambda weights: {name: w for name, w in weights.items() if "layer.1." not in name})
        with pytest.raises(
            CheckpointError, match=r"lacks 16 of the \d+ weights .*encoder\.layer\.1\..* numbers"
        ) as caught:
            load_backbone(folder) if kind == "encoder" else load_engine(folder)
        assert "\n" not in str(caught.value)

    def test_weights_under_names_of_another_model_are_all_missing(self, encoder):
        change_weights(encoder, lambda weights: {f"weight{n}": tensor for n, tensor in enumerate(weights.values())})
        with pytest.raises(CheckpointError, match=r"lacks 53 of the 53 weights"):
            MixEncoder.from_backbone(encoder)

    def test_two_encoders_in_one_file_are_refused(self, encoder):
        change_weights(
            encoder, lambda weights: {**prefixed("query.")(weights), **prefixed("document.")(copy.deepcopy(weights))}
        )
        with pytest.raises(CheckpointError, match=r"holds 2 encoders, whose weights begin with document\., query\."):
            load_backbone(encoder)

    def test_other_shapes_are_named_with_both(self, encoder):
        change_fields(encoder, vocab_size=40)
        expected = r"1 weights of other shapes .*word_embeddings.weight \(27, 32\) instead of \(40, 32\)"
        with pytest.raises(CheckpointError, match=expected):
            load_backbone(encoder)

    @pytest.mark.parametrize("kind", ["encoder", "own"])
    def test_layers_that_the_configuration_does_not_describe_are_refused(self, request, kind):
        folder = request.getfixturevalue(kind)
        fields = json.loads((folder / "config.json").read_text())
        (fields if kind == "encoder" else fields["backbone_config"])["num_hidden_layers"] = 2
        change_fields(folder, **fields)
        with pytest.raises(
            CheckpointError, match=r"holds 16 weights that its config.json does not describe: .*layer\.2\."
        ):
            load_backbone(folder)

    def test_weights_of_a_layer_that_this_kind_does_not_have_are_refused(self, encoder):
        name = "encoder.layer.0.attention.self.distance_embedding.weight"
        change_weights(encoder, lambda weights: {**weights, name: torch.zeros(79, 16)})
        with pytest.raises(CheckpointError, match=r"1 weights that .* does not describe: .*distance_embedding"):
            load_backbone(encoder)

    def test_integer_tensors_are_no_weights(self, encoder):
        change_weights(encoder, lambda weights: {name: tensor.to(torch.int8) for name, tensor in weights.items()})
        with pytest.raises(CheckpointError, match=r"53 weights in dtypes that are not .*I8.*quantised"):
            load_backbone(encoder)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("kind", ["encoder", "own", "dual"])
    def test_weights_that_are_not_finite_are_named(self, request, kind, value):
        folder = request.getfixturevalue(kind)
        (name,) = [name for name in load_file(folder / "model.safetensors") if "layer.1.output.dense.bias" in name]

        def change(weights: dict) -> dict:
            weights[name][3] = value
            return weights

        change_weights(folder, change)
        with pytest.raises(CheckpointError, match=r"NaN or an infinity in .*layer\.1\.output\.dense\.bias"):
            load_backbone(folder) if kind == "encoder" else load_engine(folder)

    def test_weights_too_large_for_the_dtype_are_named_and_large_sums_are_not(self, own):
        def change(weights: dict) -> dict:
            weights["backbone.embeddings.LayerNorm.weight"].fill_(3e38)
            return weights

        change_weights(own, change)
        load_model(own, torch.float32, MixEncoderModel)
        with pytest.raises(
            CheckpointError, match=r"infinity in backbone\.embeddings\.LayerNorm\.weight, as torch\.float16"
        ):
            load_model(own, torch.float16, MixEncoderModel)

    def shard(self, folder: Path) -> dict:
        weights = load_file(folder / "model.safetensors")
        names = sorted(weights)
        places = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            save_file({name: weights[name] for name in part}, folder / f"model-{number}.safetensors", {"format": "pt"})
            places |= dict.fromkeys(part, f"model-{number}.safetensors")
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return places

    def test_shards_are_read_and_a_missing_one_is_named(self, encoder, backbone_path):
        self.shard(encoder)
        found, want = load_backbone(encoder).state_dict(), load_backbone(backbone_path).state_dict()
        assert all(torch.equal(found[name], want[name]) for name in want)
        (encoder / "model-2.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"names the file 'model-2\.safetensors', which is not in"):
            load_backbone(encoder)

    def test_shards_outside_of_the_folder_are_not_opened(self, encoder):
        places = self.shard(encoder)
        shutil.move(encoder / "model-2.safetensors", encoder.parent)
        moved = {name: place.replace("model-2", "../model-2") for name, place in places.items()}
        (encoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": moved}))
        with pytest.raises(CheckpointError, match=r"names the file '\.\./model-2\.safetensors'"):
            load_backbone(encoder)

    @pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{"])
    def test_a_damaged_list_of_shards_is_named(self, encoder, content):
        self.shard(encoder)
        (encoder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
            load_backbone(encoder)

    def test_pickled_weights_are_not_opened_and_safetensors_is_expected(self, encoder):
        (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"no model\.safetensors, only pytorch_model\.bin, .*save_pretrained"):
            load_backbone(encoder)

    def test_an_adapter_is_not_taken_for_the_encoder(self, encoder):
        (encoder / "adapter_config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"holds an adapter .*merge"):
            load_backbone(encoder)


class TestCode:
    EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass T: ...\n"

    def poison(self, folder: Path) -> None:
        (folder / "evil.py").write_text(self.EVIL)
        classes = {"AutoConfig": "evil.T", "AutoModel": "evil.T", "AutoTokenizer": ["evil.T", "evil.T"]}
        fields = json.loads((folder / "config.json").read_text())
        if "backbone_config" in fields:
            fields["backbone_config"]["auto_map"] = classes
        change_fields(folder, **fields, auto_map=classes)
        change_fields(folder, "tokenizer_config.json", auto_map=classes, tokenizer_class="T")

    def test_no_code_runs_and_no_question_is_asked(self, own, encoder, tmp_path):
        for folder in (own, encoder):
            self.poison(folder)
        script = (
            "import sys\nfrom mixencoder import MixEncoder\nfrom mixencoder.architectures import load_engine\n"
            "from mixencoder.errors import CheckpointError\n"
            "for load, folder in ((load_engine, sys.argv[1]), (MixEncoder.from_backbone, sys.argv[2])):\n"
            "    try:\n        load(folder)\n    except CheckpointError as error:\n        print(error)\n"
            "print('left', sys.stdin.read())"
        )
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "TRUST_REMOTE_CODE": "1"}
        command = [sys.executable, "-c", script, str(own), str(encoder)]
        done = subprocess.run(command, input="y\ny\n", capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        # whether it was loaded by a class of transformers or refused, standard input was not read
        assert done.stdout.endswith("left y\ny\n\n"), done.stdout
        assert "[y/N]" not in done.stdout
        assert not list(tmp_path.rglob("ran"))

    @pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
    def test_kernels_that_a_configuration_names_are_not_downloaded(self, own, field, checkpoint):
        fields = json.loads((own / "config.json").read_text())
        fields["backbone_config"][field] = "somebody/kernels"
        change_fields(own, **fields, **{field: "somebody/kernels"})
        found, want = MixEncoder.from_pretrained(own), MixEncoder.from_pretrained(checkpoint)
        assert found.predict([("rice", "boil")]) == want.predict([("rice", "boil")])

    def test_weights_elsewhere_that_a_configuration_names_are_not_read(self, own, checkpoint):
        change_fields(own, transformers_weights="../elsewhere.safetensors", dtype="float99")
        found, want = MixEncoder.from_pretrained(own), MixEncoder.from_pretrained(checkpoint)
        assert found.predict([("rice", "boil")]) == want.predict([("rice", "boil")])

    def test_quantised_weights_are_refused(self, encoder):
        change_fields(encoder, quantization_config={"quant_method": "gptq"})
        with pytest.raises(CheckpointError, match="quantised"):
            load_backbone(encoder)


class TestTokenizer:
    @pytest.mark.parametrize("load", [MixEncoder.from_pretrained, load_tokenizer])
    def test_without_its_vocabulary_it_is_refused(self, own, load):
        (own / "tokenizer.json").unlink()
        change_fields(own, "tokenizer_config.json", tokenizer_class="BertTokenizer")
        with pytest.raises(CheckpointError, match=r"no vocabulary, only 5 special tokens; expected tokenizer\.json"):
            load(own)

    def test_one_that_knows_no_word_is_refused(self, encoder):
        fields = json.loads((encoder / "tokenizer.json").read_text())
        # every text becomes a word that is not in the vocabulary
        fields["normalizer"] = {"type": "Replace", "pattern": {"Regex": "\\w+"}, "content": "qqq"}
        change_fields(encoder, "tokenizer.json", **fields)
        with pytest.raises(CheckpointError, match=r"reads every word as unknown \(\[UNK\]\)"):
            MixEncoder.from_backbone(encoder)

    @pytest.mark.parametrize("load", [MixEncoder.from_backbone, CrossEncoder.from_backbone])
    def test_tokens_that_the_encoder_has_no_embedding_for_are_refused(self, encoder, tokenizer, load):
        grown = copy.deepcopy(tokenizer)
        grown.add_tokens(["zzqq", "zzqqq"])
        grown.save_pretrained(encoder)
        with pytest.raises(CheckpointError, match=r"29 tokens, but the encoder has embeddings for 27; .*resize"):
            load(encoder)

    def test_a_checkpoint_whose_tokenizer_outgrew_it_is_refused(self, own, tokenizer):
        grown = copy.deepcopy(tokenizer)
        grown.add_tokens(["zzqq"])
        grown.save_pretrained(own)
        with pytest.raises(CheckpointError, match=r"28 tokens, but the encoder has embeddings for 27"):
            MixEncoder.from_pretrained(own)

    @pytest.mark.parametrize("content", ["{", "[1]", '{"model": 1}', "[" * 100_000])
    def test_a_damaged_one_is_refused_in_one_line(self, own, content):
        (own / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match="own") as caught:
            MixEncoder.from_pretrained(own)
        assert "\n" not in str(caught.value)


VALUES = ["abc", None, -1, 0, 1.5, [], {}, [1, 2], {"a": 1}, True, 10**12, "", "1", 1e308, -0.5]
MUTATIONS = 60


def mutated(chance: random.Random, fields: dict) -> tuple[str, dict]:
    """Return fields of which one, at any depth, is dropped, has another value, or has another field's name."""
    fields = copy.deepcopy(fields)
    place = chance.choice([fields, fields["backbone_config"], fields["backbone_config"]])
    name = chance.choice(sorted(place))
    what = chance.choice(["drop", "value", "value", "value", "nest"])
    if what == "drop":
        del place[name]
    elif what == "nest":
        place[name] = {name: place[name]}
    else:
        place[name] = chance.choice(VALUES)
    return f"{what} {name} {place.get(name)!r}", fields


class TestConfiguration:
    @pytest.mark.parametrize("kind", ["own", "dual"])
    def test_odd_configurations_are_read_or_refused_in_one_line(self, request, kind):
        folder = request.getfixturevalue(kind)
        fields = json.loads((folder / "config.json").read_text())
        chance = random.Random(0)
        refused, wrong = 0, []
        for _ in range(MUTATIONS):
            what, changed = mutated(chance, fields)
            (folder / "config.json").write_text(json.dumps(changed))
            try:
                load_engine(folder).rank("rice", TEXTS)
            except CheckpointError as error:
                refused += 1
                if "\n" in str(error):
                    wrong.append((what, str(error)))
            except Exception as error:
                wrong.append((what, repr(error)[:300]))
        assert not wrong
        assert refused > MUTATIONS / 4

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"hidden_size": "abc"}, ["hidden_size"]),
            ({"hidden_size": None}, ["hidden_size"]),
            ({"num_attention_heads": 5}, ["32", "5"]),
            ({"hidden_act": "nonsense"}, ["nonsense"]),
            ({"num_hidden_layers": -1}, ["num_hidden_layers", "-1"]),
            ({"model_type": "gpt2"}, ["gpt2"]),
            ({"model_type": "nonsense"}, ["nonsense"]),
            ({"layer_norm_eps": "small"}, ["layer_norm_eps"]),
            ({"is_decoder": True}, ["is_decoder"]),
            ({"max_position_embeddings": 2}, ["position"]),
            # huge sizes: refused before memory is allocated
            ({"num_hidden_layers": 100_000}, ["100,000", "layers"]),
            ({"num_hidden_layers": 900}, ["900 layers", "weights"]),
            ({"hidden_size": 10**9}, ["1,000,000,000", "rows or columns"]),
            ({"vocab_size": 10**12}, ["1,000,000,000,000", "rows or columns"]),
            ({"max_position_embeddings": 10**12}, ["shapes", "numbers"]),
            ({"intermediate_size": 10**12}, ["shapes", "numbers"]),
            ({"type_vocab_size": 10**12}, ["shapes", "numbers"]),
            ({"num_labels": 10**12}, []),
        ],
        ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
    )
    @pytest.mark.parametrize("kind", ["encoder", "own"])
    def test_a_bad_value_is_refused_at_once_with_what_was_found(self, request, kind, changes, words):
        folder = request.getfixturevalue(kind)
        fields = json.loads((folder / "config.json").read_text())
        (fields if kind == "encoder" else fields["backbone_config"]).update(changes)
        change_fields(folder, **fields)
        start = time.perf_counter()
        if "num_labels" in changes:
            # number of labels of a head that is not loaded
            load_backbone(folder)
        else:
            with pytest.raises(MixEncoderError) as caught:
                load_backbone(folder)
            assert kind == "encoder" or isinstance(caught.value, CheckpointError)
            for word in words:
                assert word in str(caught.value)
            assert "\n" not in str(caught.value)
        assert time.perf_counter() - start < 5

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"num_labels": 10**12, "heads": ["classification"]}, ["num_labels 1,000,000,000,000"]),
            ({"num_context_embeddings": 10**12}, ["num_context_embeddings"]),
            ({"backbone_config": None}, ["backbone_config"]),
            ({"backbone_config": ["bert"]}, ["backbone_config"]),
            ({"model_type": None}, ["None", "from_backbone"]),
        ],
    )
    def test_a_bad_value_of_its_own_is_refused(self, own, changes, words):
        change_fields(own, **changes)
        with pytest.raises(CheckpointError) as caught:
            load_model(own, torch.float32, MixEncoderModel)
        for word in words:
            assert word in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ('{"a": ' * 200_000, "not valid JSON"),
            ("[" * 200_000 + "]" * 200_000, "nested too deep"),
            ('{"layer_norm_eps": NaN}', "NaN is not allowed"),
            ('{"layer_norm_eps": -Infinity}', "Infinity is not allowed"),
            ('{"layer_norm_eps": 1e999}', "too large"),
            ('{"vocab_size": ' + "9" * 5000 + "}", "not valid JSON"),
            ("[]", "holds a list; expected a JSON object"),
            ('"bert"', "holds a str"),
            ("", "not valid JSON"),
            ("\ufeff{}", "not valid JSON"),
            (" " * (17 * 2**20) + "{}", "bytes; expected at most"),
        ],
        ids=lambda value: value[:20],
    )
    @pytest.mark.parametrize("kind", ["encoder", "own"])
    def test_an_invalid_configuration_is_refused(self, request, kind, content, words):
        folder = request.getfixturevalue(kind)
        (folder / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=words):
            load_engine(folder) if kind == "own" else load_backbone(folder)
