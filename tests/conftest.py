"""Shared fixtures: which backends run here, tiny models and tokenizers made in memory, and a guard on the kernels.

Without a GPU the Triton kernels run in the interpreter, whose switch must be set before triton is imported anywhere.
Several processes of pytest-xdist share the threads, which must be said before torch is.
"""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
    # a thread that spins while it waits takes the core that another process needs: tests of two threads took five times
    # as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# what a shell starts in the background ignores Ctrl-C, and so would every process that a test starts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

KERNEL_RUNS = pytest.StashKey[int]()
SLOW_FILES = {"test_bits.py", "test_learning.py", "test_index_faults.py", "test_checkpoint_faults.py"}
"""Files that take most of a minute, to be given to a process of pytest-xdist before the others are."""

# fmt: off
WORDS = ["the", "a", "how", "to", "cook", "rice", "undo", "git", "commit", "paris", "is", "capital", "of", "france",
         "boil", "water", "in", "pot", "dog", "cat", "sat", "mat"]
# fmt: on


@pytest.fixture(scope="session")
def words() -> list[str]:
    return WORDS


def backbone_config(kind: str = "bert", **changes: object):
    """Return a tiny random encoder's configuration."""
    sizes = {
        "vocab_size": len(WORDS) + 5,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    }
    own = {
        "electra": {"embedding_size": 24},
        # 3 layers in 2 groups: the first two layers are one module
        "albert": {"embedding_size": 24, "num_hidden_groups": 2},
        "distilbert": {"hidden_dim": sizes["intermediate_size"]},
        # tokens further apart than 2 do not see each other in every layer but the first
        "modernbert": {
            "local_attention": 4,
            "bos_token_id": 2,
            "cls_token_id": 2,
            "eos_token_id": 3,
            "sep_token_id": 3,
        },
    }
    return CONFIG_MAPPING[kind](**{**sizes, **own.get(kind, {}), **changes})


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer over `WORDS`, with BERT's special tokens."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*specials, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="session")
def backbone_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Return the folder of a tiny random BERT with its tokenizer."""
    from transformers import BertModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone")
    # weights of some size, so that scores differ by more than rounding
    BertModel(backbone_config(initializer_range=0.3), add_pooling_layer=False).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def checkpoint(backbone_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny random MixEncoder with the dual term."""
    from mixencoder import MixEncoder

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    MixEncoder.from_backbone(backbone_path, dual_term=True).save_pretrained(path)
    return str(path)


@pytest.fixture
def own(checkpoint: str, tmp_path: Path) -> Path:
    """Return a tiny MixEncoder's folder to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "own"))


@pytest.fixture
def encoder(backbone_path: Path, tmp_path: Path) -> Path:
    """Return a tiny BERT's folder to damage."""
    return Path(shutil.copytree(backbone_path, tmp_path / "encoder"))


@pytest.fixture
def dual(backbone_path: Path, tmp_path: Path) -> Path:
    """Return a tiny dual-encoder's folder to damage."""
    from mixencoder.peers import DualEncoder

    DualEncoder.from_backbone(backbone_path).save_pretrained(tmp_path / "dual")
    return tmp_path / "dual"


@pytest.fixture(scope="module", params=["mixencoder", "cross-encoder", "late-interaction"])
def engine(request: pytest.FixtureRequest, backbone_path: Path) -> Any:
    """Return tiny engines: one that has an index, one that encodes nothing ahead, one that does."""
    from tests.base.engine_cases import untrained

    return untrained(request.param, backbone_path)


def pytest_configure(config: pytest.Config) -> None:
    """Keep pytest-xdist from starting files in the order of their numbers of tests: a slow file may have few."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put slow files first, and leave tests out of a run that asks for benchmarks alone, instead of skipping each."""
    items.sort(key=lambda item: item.path.name not in SLOW_FILES)
    if config.getoption("benchmark_only", False):
        tests = [item for item in items if not item.path.name.startswith("bench_")]
        config.hook.pytest_deselected(items=tests)
        items[:] = [item for item in items if item.path.name.startswith("bench_")]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU: none is visible")


def count_kernel_run(config: pytest.Config) -> None:
    """Note that a test ran a real kernel; see `pytest_sessionfinish`."""
    config.stash[KERNEL_RUNS] = config.stash.get(KERNEL_RUNS, 0) + 1


@pytest.fixture(params=["reference", "torch", "triton"])
def backend(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> str:
    """Return every backend in turn; without a GPU Triton's kernels are interpreted."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        count_kernel_run(pytestconfig)
    return request.param


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Add up what the processes of pytest-xdist ran, where there are any."""
    runs = getattr(node, "workeroutput", {}).get("kernel_runs", 0)
    node.config.stash[KERNEL_RUNS] = node.config.stash.get(KERNEL_RUNS, 0) + runs


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a whole run in which no Triton kernel ran: the kernels' source would have gone untested."""
    config = session.config
    runs = config.stash.get(KERNEL_RUNS, 0)
    if hasattr(config, "workeroutput"):
        # one of several processes: the first one judges
        config.workeroutput["kernel_runs"] = runs
        return
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not (
        config.option.keyword or config.option.markexpr or config.option.collectonly
    )
    benchmarks_only = config.getoption("benchmark_only", False)
    if whole and not benchmarks_only and not session.shouldstop and runs == 0:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line("ERROR: no Triton kernel ran in this test run (interpreted or compiled)", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
