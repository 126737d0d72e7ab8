"""Runs of the trainer: what stops one, what an interrupted one leaves, and that it goes on exactly."""

import copy
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixencoder import MixEncoder
from mixencoder.architectures import ARCHITECTURES, engine_class, load_engine
from mixencoder.base.tokenization import pad
from mixencoder.data.examples import read_source
from mixencoder.errors import CheckpointError, DataError, EmptyTextWarning, InputError, NonFiniteError
from mixencoder.training.checks import check_texts
from mixencoder.training.folders import last_checkpoint
from mixencoder.training.run import DataSpec, TrainConfig, train
from tests.training.synthetic import partner_pairs, write


def options(tmp_path: Path, backbone_path: Path, words: list[str], **changes) -> TrainConfig:
    data = tmp_path / "pairs.jsonl"
    if not data.exists():
        write(data, partner_pairs(words, 40))
    fields = {"output": str(tmp_path / "out"), "data": [str(data)], "backbone": str(backbone_path), "steps": 3}
    return TrainConfig(**{**fields, **changes})


def weights(engine) -> dict[str, torch.Tensor]:
    return engine.model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_all_tasks_train_beside_each_other(tmp_path, backbone_path, words):
    nli = write(
        tmp_path / "nli.jsonl",
        [{"premise": f"the {w}", "hypothesis": w, "label": ["yes", "no"][i % 2]} for i, w in enumerate(words)],
    )
    sts = write(
        tmp_path / "sts.jsonl",
        [{"sentence1": w, "sentence2": f"a {w}", "score": float(i)} for i, w in enumerate(words)],
    )
    graded = write(
        tmp_path / "graded.jsonl", [{"query": w, "candidates": [w, "a", "the"], "labels": [2, 1, 0]} for w in words]
    )
    config = options(tmp_path, backbone_path, words, steps=16, batch_size=8)
    config = TrainConfig(**{**asdict(config), "data": [f"{config.data[0]}=2", str(nli), str(sts), str(graded)]})
    before = weights(MixEncoder.from_backbone(backbone_path))
    engine = train(config)
    # heads and class names are read off the data
    assert engine.config.heads == ["ranking", "classification"]
    assert engine.config.label2id == {"no": 0, "yes": 1}
    assert engine.predict([("the cat", "cat")], head="classification").shape == (1, 2)
    after = weights(engine)
    changed = {name for name in before if name.startswith("backbone") and not torch.equal(before[name], after[name])}
    assert any("layer" in name for name in changed)
    # frozen by default
    assert not any("embeddings" in name for name in changed)


def test_rows_serve_as_data(tmp_path, backbone_path, words):
    spec = DataSpec(partner_pairs(words, 20), weight=2.0, name="mine")
    engine = train(options(tmp_path, backbone_path, words, data=[spec], architecture="dual-encoder"))
    assert type(engine).__name__ == "DualEncoder"
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["data"] == [{"name": "mine", "weight": 2.0}]


def test_a_generator_of_rows_is_read_once_and_kept(tmp_path, backbone_path, words):
    rows = ({"premise": "a", "hypothesis": w, "label": ["x", "y"][i % 2]} for i, w in enumerate(words))
    engine = train(options(tmp_path, backbone_path, words, data=[DataSpec(rows)], architecture="dual-encoder"))
    assert engine.config.label2id == {"x": 0, "y": 1}


def test_the_record_says_how_a_model_was_trained_and_names_no_path(tmp_path, backbone_path, words):
    train(options(tmp_path, backbone_path, words, log_every=1, seed=7))
    text = (tmp_path / "out" / "training.json").read_text()
    record = json.loads(text)
    assert record["settings"]["seed"] == 7
    assert record["settings"]["backbone"] == backbone_path.name
    assert record["examples"] == {"pairs": 40}
    assert [entry["step"] for entry in record["log"] if "loss" in entry] == [1, 2, 3]
    assert str(tmp_path) not in text
    assert not (tmp_path / "out.unfinished").exists()


def test_the_same_seed_trains_the_same_model(tmp_path, backbone_path, words):
    models = [
        weights(train(options(tmp_path, backbone_path, words, output=str(tmp_path / f"out{i}"), seed=seed)))
        for i, seed in enumerate((1, 1, 2))
    ]
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_it_goes_on_from_a_trained_model_of_any_architecture(tmp_path, backbone_path, words):
    train(options(tmp_path, backbone_path, words, architecture="poly-encoder"))
    again = options(tmp_path, None, words, backbone=None, model=str(tmp_path / "out"), output=str(tmp_path / "more"))
    assert type(train(again)).__name__ == "PolyEncoder"
    wrong = {"architecture": "deformer", "output": str(tmp_path / "other")}
    with pytest.raises(InputError, match="is a PolyEncoder; expected a deformer"):
        train(TrainConfig(**{**asdict(again), **wrong}))


def test_what_cannot_be_trained_is_found_before_training(tmp_path, backbone_path, words):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    cases = [
        ({"output": str(full)}, InputError, "exists and is not empty"),
        ({"model": "x"}, InputError, "not both"),
        ({"model": "x", "backbone": None, "config": {"dual_term": True}}, InputError, "has its own"),
        ({"model": str(tmp_path / "none"), "backbone": None}, CheckpointError, "is not a directory"),
        ({"architecture": "bi-encoder"}, InputError, "architecture is 'bi-encoder'; expected one of mixencoder"),
        ({"data": []}, DataError, "no training data are named"),
        ({"data": ["x=high"]}, InputError, "weight of x is 'high'"),
        ({"data": ["x=-1"]}, InputError, "weight of x is -1.0; expected a positive"),
        ({"data": [{"path": "x"}]}, InputError, "expected source, weight, task, name"),
        ({"steps": 0}, InputError, "steps is 0"),
        ({"mini_batch_size": 0}, InputError, "mini_batch_size is 0"),
        ({"distillation": "mse"}, InputError, "distillation is 'mse'; expected one of kl, margin-mse"),
        ({"distillation_weight": 2}, InputError, "distillation_weight is 2"),
        ({"temperature": 0}, InputError, "temperature is 0"),
        ({"learning_rate": "high"}, InputError, "learning_rate is 'high'; expected a number"),
        ({"weight_decay": float("nan")}, InputError, "weight_decay is nan"),
        ({"in_batch": False, "negatives": 0}, InputError, "negatives is 0"),
        ({"teacher": str(tmp_path / "none")}, CheckpointError, "is not a directory"),
        ({"config": {"num_context_embeddings": 99}}, InputError, "num_context_embeddings is 99"),
        ({"config": {"heads": ["classification"]}}, DataError, "need a ranking head"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            train(options(tmp_path, backbone_path, words, **changes))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize("text", [" ", "", "\u200b"], ids=["blank", "empty", "blank to the tokenizer alone"])
def test_a_text_without_a_token_is_counted_or_refused_before_training(tmp_path, tokenizer, text):
    from tokenizers import normalizers

    cleaning = copy.deepcopy(tokenizer)
    cleaning.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    rows = [{"premise": "a", "hypothesis": other, "label": "y"} for other in ("the", text, text)]
    rows.append({"premise": "a", "hypothesis": "cat", "label": "x"})
    source = read_source(write(tmp_path / "data.jsonl", rows), label2id={"x": 0, "y": 1})
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: .* holds no token; expected some text"):
        check_texts([source], cleaning, "error")
    words = "2 texts hold no token and are read as the tokenizer's special tokens alone"
    with pytest.warns(EmptyTextWarning, match=rf"^{words}; the first: .*data\.jsonl, line 2"):
        check_texts([source], cleaning)


def test_a_run_may_refuse_texts_without_a_token(tmp_path, backbone_path, words):
    rows = [{"premise": "a", "hypothesis": word, "label": label} for word, label in (("cat", "x"), (" ", "y"))]
    data = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: ' ' holds no token"):
        train(options(tmp_path, backbone_path, words, data=[str(data)], on_empty="error"))
    assert not (tmp_path / "out.unfinished").exists()


def test_batches_with_nothing_to_tell_apart_are_refused(tmp_path, backbone_path, words):
    scored = write(
        tmp_path / "sts.jsonl", [{"sentence1": "a", "sentence2": word, "score": i} for i, word in enumerate(words)]
    )
    hard = write(tmp_path / "hard.jsonl", [{"query": word, "positive": word, "negative": "the"} for word in words])
    one = write(tmp_path / "one.jsonl", [{"query": "a", "positive": "cat"}])
    for changes, message in (
        ({"batch_size": 1}, "pairs has 40 rows and comes in batches of 1 a process: there is nothing to tell apart"),
        ({"batch_size": 1, "data": [str(scored)]}, "sts has 22 rows and comes in batches of 1"),
        ({"batch_size": 1, "data": [str(hard)], "negatives": 0}, "hard has 22 rows"),
        ({"data": [str(one)]}, "one has 1 rows"),
        ({"data": [str(one)], "architecture": "cross-encoder"}, "one has 1 rows"),
    ):
        with pytest.raises(InputError, match=message):
            train(options(tmp_path, backbone_path, words, **changes))
    equal = write(tmp_path / "equal.jsonl", [{"query": "a", "positive": "cat"}] * 3)
    one_answer = write(tmp_path / "one_answer.jsonl", [{"query": word, "positive": "cat "} for word in words])
    one_query = write(tmp_path / "one_query.jsonl", [{"query": "a", "positive": word} for word in words])
    for data in (equal, one_answer, one_query):
        with pytest.raises(InputError, match=f"{data.stem}: every right document is right for every query of its"):
            train(options(tmp_path, backbone_path, words, data=[str(data)]))
    graded = write(
        tmp_path / "graded.jsonl",
        [{"query": word, "candidates": [word], "labels": [i % 2 + 1]} for i, word in enumerate(words)],
    )
    with pytest.raises(InputError, match="graded: in every list all documents have one label"):
        train(options(tmp_path, backbone_path, words, data=[str(graded)]))
    train(options(tmp_path, backbone_path, words, batch_size=1, data=[str(hard)]))


def test_what_the_caller_has_switched_on_changes_no_weight(tmp_path, backbone_path, words):
    """And it is what it was afterwards."""
    expected = weights(train(options(tmp_path, backbone_path, words)))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            found = weights(train(options(tmp_path, backbone_path, words, output=str(tmp_path / "other"))))
            assert torch.is_autocast_enabled("cpu")
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(found, expected)
    with torch.inference_mode():
        again = weights(train(options(tmp_path, backbone_path, words, output=str(tmp_path / "again"))))
    assert same(again, expected)


def test_a_teacher_that_does_not_fit_is_refused(tmp_path, backbone_path, words):
    labelled = write(
        tmp_path / "nli.jsonl",
        [{"premise": "a", "hypothesis": w, "label": ["x", "y"][i % 2]} for i, w in enumerate(words)],
    )
    CrossEncoder = engine_class("cross-encoder")  # noqa: N806
    CrossEncoder.from_backbone(backbone_path, num_labels=2).save_pretrained(tmp_path / "classes")
    CrossEncoder.from_backbone(backbone_path).save_pretrained(tmp_path / "ranks")
    for teacher, data, message in (
        ("classes", None, "pairs: ranking and similarity need a ranking head, which the teacher"),
        ("classes", labelled, "knows the classes .*'LABEL_0'.* expected .*'x'"),
        ("ranks", labelled, "knows the classes None"),
    ):
        changes = {"teacher": str(tmp_path / teacher)} | ({} if data is None else {"data": [str(data)]})
        with pytest.raises(DataError, match=message):
            train(options(tmp_path, backbone_path, words, **changes))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tmp_path, backbone_path, words, monkeypatch):
    monkeypatch.setattr("mixencoder.training.objective.ranking_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(NonFiniteError) as caught:
        train(options(tmp_path, backbone_path, words, batch_size=10))
    message = str(caught.value)
    assert message.startswith("the loss is nan at step 0 (ranking); the batch holds ")
    assert message.count("pairs.jsonl, line ") == 8
    assert "; and 2 more; nothing more is saved" in message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(
    tmp_path, backbone_path, words, monkeypatch
):
    """A loss may be finite where its gradient is not: here the root of nothing, from the fourth step on."""
    calls = []

    def loss(scores, *_):
        calls.append(1)
        return scores.mean() + (0 * scores.sum()).sqrt() if len(calls) > 3 else scores.mean()

    monkeypatch.setattr("mixencoder.training.objective.ranking_loss", loss)
    with pytest.raises(NonFiniteError, match=r"gradient's norm is nan at step 3 .*pairs\.jsonl, line .*nothing more"):
        train(options(tmp_path, backbone_path, words, steps=6, save_every=2))
    kept = last_checkpoint(tmp_path / "out.unfinished")
    assert kept.name == "checkpoint-2"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(kept / "model.safetensors").values())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layers", [[-1], [-2, -1]])
def test_bfloat16_trains(tmp_path, backbone_path, words, layers):
    config = {"interaction_layers": layers}
    engine = train(options(tmp_path, backbone_path, words, bf16=True, steps=2, config=config))
    assert engine.dtype == torch.float32
    assert all(torch.isfinite(tensor).all() for tensor in weights(engine).values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mini_batches_give_the_gradients_of_the_whole_batch(backbone_path, words, architecture):
    torch.manual_seed(0)
    engine = engine_class(architecture).from_backbone(backbone_path)
    rows = partner_pairs(words, 6)
    query = pad(engine.read_query([row["query"] for row in rows]), 0)
    document = pad(engine.read_document([row["positive"] + " the" * (i % 3) for i, row in enumerate(rows)]), 0)
    gradients = []
    for size in (None, 4, 1):
        engine.model.train().zero_grad()
        for module in engine.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        scores = engine.model(*query, *document, mini_batch_size=size).full
        torch.nn.functional.cross_entropy(scores, torch.arange(6)).backward()
        gradients.append({n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None})
    for chunked in gradients[1:]:
        assert chunked.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(chunked[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_mini_batches_keep_the_dropout_of_the_first_pass(backbone_path, words):
    """A piece is computed twice; with other masks the second time its gradients would be those of another function."""
    torch.manual_seed(0)
    engine = engine_class("dual-encoder").from_backbone(backbone_path)
    model = engine.model.train()
    document = pad(engine.read_document([row["positive"] for row in partner_pairs(words, 4)]), 0)
    query = pad(engine.read_query(["the cat", "the dog"]), 0)
    calls = []
    model.backbone.encoder.layer[0].register_forward_hook(lambda *args: calls.append(args[2].detach().clone()))
    model(*query, *document, mini_batch_size=2).full.sum().backward()
    # one piece of queries and two of documents, each of which came again
    assert len(calls) == 5
    first, again = calls[1:3], calls[3:]
    assert any(torch.equal(first[0], tensor) for tensor in again)
    assert any(torch.equal(first[1], tensor) for tensor in again)


def test_accumulated_batches_make_the_step_of_a_large_one(tmp_path, backbone_path, words):
    """Labelled pairs have no in-batch negatives, so that only the order of sums differs."""
    rows = [{"premise": "a", "hypothesis": w, "label": ["x", "y"][i % 2]} for i, w in enumerate(words[:16])]
    data = [str(write(tmp_path / "nli.jsonl", rows))]
    fields = {"data": data, "architecture": "dual-encoder", "steps": 1, "config": {"classifier_dropout": 0.0}}
    fields |= {"learning_rate": 1e-3, "log_every": 1, "backbone": str(without_dropout(backbone_path, tmp_path))}
    start = weights(engine_class("dual-encoder").from_backbone(backbone_path))
    whole = train(options(tmp_path, backbone_path, words, batch_size=16, **fields))
    fields |= {"output": str(tmp_path / "parts")}
    parts = train(options(tmp_path, backbone_path, words, batch_size=4, gradient_accumulation_steps=4, **fields))
    assert_close(weights(parts), weights(whole))
    moved = "backbone.encoder.layer.2.output.dense.weight"
    assert not torch.equal(weights(whole)[moved], start[moved])
    # AdamW's first step is the same whatever a gradient's size
    first, second = (gradient_norms(tmp_path / name) for name in ("out", "parts"))
    assert len(first) == 1
    assert second == pytest.approx(first, rel=1e-4)


def gradient_norms(output: Path) -> list[float]:
    """Return the norm of each step's gradient, as a run with log_every=1 wrote it down."""
    log = json.loads((output / "training.json").read_text())["log"]
    return [entry["grad_norm"] for entry in log if "grad_norm" in entry]


def without_dropout(backbone_path: Path, tmp_path: Path) -> Path:
    """Copy an encoder, its dropout switched off."""
    folder = tmp_path / "plain"
    shutil.copytree(backbone_path, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    # the first step of AdamW moves weights by the sign of their gradients, which may flip where they are nothing; those
    # of keys' biases are: they move all logits of a softmax alike
    for name, tensor in expected.items():
        if name.endswith("key.bias"):
            continue
        off = (found[name] - tensor).abs() > 1e-5
        assert off.float().mean() < 0.02, name


def test_a_killed_run_goes_on_to_the_weights_of_an_uninterrupted_one(tmp_path, backbone_path, words):
    config = options(tmp_path, backbone_path, words, steps=40, batch_size=4, save_every=6)
    whole = weights(train(TrainConfig(**{**asdict(config), "output": str(tmp_path / "whole")})))
    script = (
        "import json, sys, torch; torch.set_num_threads(int(sys.argv[2]))\n"
        "from mixencoder.training.run import TrainConfig, train\n"
        "train(TrainConfig(**json.loads(sys.argv[1])))"
    )
    command = [sys.executable, "-c", script, json.dumps(asdict(config)), str(torch.get_num_threads())]
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2]
    )
    unfinished = tmp_path / "out.unfinished"
    deadline = time.monotonic() + 120
    while last_checkpoint(unfinished) is None and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert last_checkpoint(unfinished) is not None
    assert not (tmp_path / "out").exists()
    # a checkpoint that was being written when the run was killed is no checkpoint
    half = unfinished / "checkpoint-39"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="holds an interrupted run; continue it"):
        train(config)
    with pytest.raises(InputError, match="begun with other settings: seed 5 instead of 0"):
        train(TrainConfig(**{**asdict(config), "resume": True, "seed": 5}))
    resumed = train(TrainConfig(**{**asdict(config), "resume": True}))
    assert same(weights(resumed), whole)
    assert same(weights(load_engine(tmp_path / "out")), whole)
    assert not unfinished.exists()


def test_a_run_killed_after_its_end_is_found_to_be_done(tmp_path, backbone_path, words, monkeypatch):
    config = options(tmp_path, backbone_path, words, steps=2)
    with monkeypatch.context() as patch:
        # as if killed between the last two things that it does
        patch.setattr("mixencoder.training.run.RunFolder.remove", lambda *_: None)
        done = weights(train(config))
    assert (tmp_path / "out.unfinished").is_dir()
    with pytest.raises(InputError, match="exists and is not empty"):
        train(config)
    with pytest.raises(InputError, match="begun with other settings: seed 5 instead of 0"):
        train(TrainConfig(**{**asdict(config), "resume": True, "seed": 5}))
    assert same(weights(train(TrainConfig(**{**asdict(config), "resume": True}))), done)
    assert not (tmp_path / "out.unfinished").exists()
    assert json.loads((tmp_path / "out" / "training.json").read_text())["settings"]["steps"] == 2


def test_a_second_run_keeps_its_hands_off_the_first_ones_folder(tmp_path, backbone_path, words):
    config = options(tmp_path, backbone_path, words)
    unfinished = tmp_path / "out.unfinished"
    unfinished.mkdir()
    first = os.open(unfinished, os.O_RDONLY)
    try:
        fcntl.flock(first, fcntl.LOCK_EX)
        for resume in (False, True):
            with pytest.raises(InputError, match=r"out\.unfinished is in use by another run"):
                train(TrainConfig(**{**asdict(config), "resume": resume}))
        assert unfinished.is_dir()
    finally:
        os.close(first)
    # the system let go of it, as it does when a run dies
    train(config)
    assert not unfinished.exists()


def test_two_processes_make_the_steps_of_one(tmp_path, backbone_path, words):
    rows = [{"premise": "a", "hypothesis": w, "label": ["x", "y"][i % 2]} for i, w in enumerate(words[:16])]
    data = [str(write(tmp_path / "nli.jsonl", rows))]
    fields = {"data": data, "architecture": "dual-encoder", "steps": 2, "config": {"classifier_dropout": 0.0}}
    fields |= {"backbone": str(without_dropout(backbone_path, tmp_path))}
    alone = train(options(tmp_path, backbone_path, words, batch_size=8, **fields))
    config = options(tmp_path, backbone_path, words, batch_size=4, **fields, output=str(tmp_path / "two"))
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mixencoder"]
    command += ["train", "--config", str(tmp_path / "config.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment, timeout=240
    )
    assert run.returncode == 0, run.stderr
    assert_close(weights(load_engine(tmp_path / "two")), weights(alone))
    assert json.loads((tmp_path / "two" / "training.json").read_text())["processes"] == 2
