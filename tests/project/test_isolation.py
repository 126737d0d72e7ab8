"""What the library needs: no network for a local model, and none of the optional packages to rank."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
BLOCKED = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        # not an exception that a library could catch and pass over
        print("network:", event, arguments, flush=True)
        import os
        os._exit(9)

sys.addaudithook(refuse)
"""
RANK = """
from mixencoder import MixEncoder
model = MixEncoder.from_pretrained()
answers = ["Boil it for six minutes.", "Use git reset --soft HEAD~1."]
assert model.rank("How do I undo a commit?", answers)[0]["corpus_id"] == 1
index = model.index(answers)
assert model.rank("How do I undo a commit?", index)[0]["corpus_id"] == 1
model.save_pretrained("saved")
assert MixEncoder.from_pretrained("saved").predict([("a", "b")]).shape == (1,)
"""
OPTIONAL = [
    "accelerate", "ir_measures", "sklearn", "scipy", "pyarrow", "pandas", "matplotlib",
    "sentence_transformers", "datasets", "sphinx", "langchain_core", "onnx", "onnxruntime",
]  # fmt: skip


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_guard_that_does_not_catch_would_be_seen(tmp_path):
    with pytest.raises(AssertionError, match=r"network: socket\."):
        run(BLOCKED + "import socket; socket.create_connection(('127.0.0.1', 9))", tmp_path)


def test_a_local_model_is_loaded_indexed_and_ranked_without_a_socket(tmp_path):
    run(BLOCKED + RANK, tmp_path)


def test_commands_open_no_socket(tmp_path):
    # without HF_HUB_OFFLINE, which would hide a question to the hub
    arguments = [
        ["rank", "How do I undo a commit?", "--candidates", str(EXAMPLES / "candidates.txt"), "--top-k", "1"],
        ["train", "--data", str(EXAMPLES / "pairs.jsonl"), "--model", "bundled", "--steps", "1", "--batch-size", "2",
         "--output", "own"],
        ["evaluate", str(EXAMPLES / "dev.jsonl"), "--model", "own", "--measure", "nDCG@10"],
    ]  # fmt: skip
    code = """
import os
os.environ.pop("HF_HUB_OFFLINE", None)
from mixencoder.cli import app
for arguments in {arguments!r}:
    assert not app(arguments, standalone_mode=False)
"""
    run(BLOCKED + code.format(arguments=arguments), tmp_path)


def test_the_kernels_need_torch_alone(tmp_path):
    others = ["transformers", "tokenizers", "huggingface_hub", "safetensors", "tqdm", "mixencoder"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({others!r}))
import torch, mixkernels
def rows(*shape):
    return torch.randn(*shape, requires_grad=True)
context, own, state, key = rows(5, 2, 3, 16), rows(5, 2, 3, 16), rows(5, 3, 16), rows(1, 7, 3, 16)
found = mixkernels.candidate_attention(context, own, own, state, key, key)
found.context.sum().backward()
assert found.state.shape == (1, 5, 3, 16) and context.grad is not None
"""
    run(code, tmp_path)


def test_ranking_needs_no_optional_package(tmp_path):
    run(f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n{RANK}", tmp_path)
