"""Rankings do not depend on modes, autocast, defaults or forks of the caller; and models can be copied."""

import copy
import os
import pickle
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from mixencoder import MixEncoder
from mixencoder.base.inference_context import inference_context
from tests.base.engine_cases import untrained

DOCUMENTS = ["cook the rice in a pot", "undo the git commit", "paris is the capital of france", "the cat sat"]
QUERIES = ["how to cook rice", "git"]
HEADS = {"heads": ("ranking", "classification"), "num_labels": 3}


@pytest.fixture(scope="module", params=["mixencoder", "cross-encoder", "dual-encoder", "late-interaction"])
def engine(request, backbone_path):
    fields = {"dual_term": True, "num_context_embeddings": 2} if request.param == "mixencoder" else {}
    return untrained(request.param, backbone_path, **HEADS, **fields)


def results(engine, *, with_indexes: bool = True):
    """Yield the results of all methods of an engine."""
    pairs = [(query, text) for query in QUERIES for text in DOCUMENTS]
    yield engine.rank(QUERIES, DOCUMENTS)
    yield engine.predict(pairs).tolist()
    yield engine.predict(pairs, head="classification").tolist()
    if hasattr(engine, "encode_document"):
        candidates = engine.encode_document(DOCUMENTS)
        yield engine.rank(QUERIES, candidates)
        yield engine.interact(engine.encode_query(QUERIES), candidates).tolist()
    if hasattr(engine, "index") and with_indexes:
        yield engine.rank(QUERIES, engine.index(DOCUMENTS))


@pytest.fixture(scope="module")
def expected(engine):
    return list(results(engine))


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device():
    # tensors on it have no values, so any that is created there by mistake causes an error
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize(
    "setting",
    [
        default_dtype,
        default_device,
        deterministic,
        warnings_are_errors,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
        torch.no_grad,
        torch.inference_mode,
        torch.autograd.detect_anomaly,
    ],
    ids=["float64", "device", "deterministic", "errors", "autocast", "meta", "no_grad", "inference", "anomaly"],
)
def test_settings_of_the_caller_change_no_result(engine, expected, setting):
    with setting():
        found = list(results(engine))
    assert found == expected


def test_int8_products_do_not_read_the_default_dtype(backbone_path):
    model = MixEncoder.from_backbone(backbone_path)
    index = model.index(DOCUMENTS, layout="compact", precision="int8")
    wanted = model.rank(QUERIES, index, products="int8")
    with default_dtype():
        assert copy.deepcopy(model).rank(QUERIES, index, products="int8") == wanted


def test_a_model_without_context_rows_reads_no_default_dtype(backbone_path):
    model = MixEncoder.from_backbone(backbone_path, context_update=False)
    wanted = list(results_of_index(model))
    with default_dtype():
        assert list(results_of_index(copy.deepcopy(model))) == wanted


def results_of_index(model):
    return model.rank(QUERIES, model.index(DOCUMENTS)), model.rank(QUERIES, model.index(DOCUMENTS, layout="compact"))


@pytest.mark.parametrize("part", ["whole", "backbone", "one dropout"])
def test_a_model_that_trains_ranks_without_dropout_and_goes_on_training(engine, expected, part):
    dropouts = [module for module in engine.model.modules() if isinstance(module, nn.Dropout)]
    chosen = {"whole": engine.model, "backbone": engine.model.backbone, "one dropout": dropouts[0]}[part]
    chosen.train()
    try:
        before = [module.training for module in engine.model.modules()]
        assert list(results(engine)) == expected
        assert [module.training for module in engine.model.modules()] == before
        assert any(before)
        with pytest.raises(ZeroDivisionError):
            engine.rank("a", DOCUMENTS, activation_fn=lambda _: 1 / 0)
        assert [module.training for module in engine.model.modules()] == before
    finally:
        engine.model.eval()


def test_the_last_of_several_threads_restores_training_mode():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout()).train()
    inside, leave = threading.Event(), threading.Event()

    def infer():
        with inference_context(model):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=infer)
    thread.start()
    inside.wait(10)
    with inference_context(model):
        assert not model[1].training
    # the other thread still computes
    assert not model[1].training
    leave.set()
    thread.join()
    assert model.training
    assert model[1].training


def test_gradients_are_not_recorded_and_still_can_be(engine):
    scores = engine.predict([(QUERIES[0], DOCUMENTS[0])], convert_to_tensor=True)
    assert not scores.requires_grad
    assert all(parameter.requires_grad for parameter in engine.model.parameters())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
def test_a_copy_ranks_the_same_and_has_its_own_weights(engine, expected, copied):
    other = copied(engine.with_limits(max_document_length=30, on_empty="error"))
    assert list(results(other, with_indexes=False)) == expected[: len(list(results(engine, with_indexes=False)))]
    assert (other.read_document.max_length, other.read_query.on_empty) == (30, "error")
    theirs, ours = (next(each.model.parameters()) for each in (other, engine))
    assert torch.equal(theirs, ours)
    assert theirs.data_ptr() != ours.data_ptr()
    if hasattr(engine, "index"):
        assert other.backend == engine.backend
        index = engine.index(DOCUMENTS)
        assert other.rank(QUERIES, index) == engine.rank(QUERIES, index)
    # it has its own notices, which queries and documents share
    assert other.read_query.notices is other.read_document.notices is not engine.read_document.notices


def test_a_shallow_copy_shares_weights_and_caches(backbone_path):
    model = MixEncoder.from_backbone(backbone_path)
    other = copy.copy(model)
    assert other.model is model.model
    assert other.identity is model.identity


FORK = """
import os, sys, torch
from mixencoder import ForkedProcessError, MixEncoder

def load():
    return MixEncoder.from_backbone(sys.argv[1], device="cpu")

def child(threads, work):
    pid = os.fork()
    if pid == 0:
        status = 3
        try:
            torch.set_num_threads(threads)
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def ranks():
    assert len(model.rank("the cat", ["rice"])) == 1

def raises():
    # the threads are missing, even if the child loads the model
    for engine in (model, load()):
        for method, texts in ((engine.rank, ("a", ["rice"])), (engine.predict, ([("a", "rice")],))):
            try:
                method(*texts)
            except ForkedProcessError as error:
                assert "spawn" in str(error) and "set_num_threads(1)" in str(error)
            else:
                raise AssertionError

torch.set_num_threads(2)
model = load()
child(2, ranks)
model.rank("the cat", ["rice"] * 3)
child(2, raises)
child(1, ranks)
"""


def test_a_fork_without_threads_raises_instead_of_waiting_for_ever(backbone_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", FORK, str(backbone_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr


def test_given_embeddings_stay_on_their_device_with_any_default_device(backbone_path):
    model = MixEncoder.from_backbone(backbone_path)
    embeddings = model.encode_document(DOCUMENTS).numpy()
    want = model.rank("the cat", model.index(embeddings=embeddings, ids=["a", "b", "c", "d"]))
    with default_device():
        index = model.index(embeddings=embeddings, ids=["a", "b", "c", "d"])
    assert model.rank("the cat", index) == want
