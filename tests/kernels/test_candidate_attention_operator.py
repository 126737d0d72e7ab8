"""The public operator: its error messages, the backend that it chooses, what it imports."""

import subprocess
import sys

import pytest
import torch

import mixkernels
from mixkernels import BackendError, DtypeError, ShapeError, candidate_attention


def inputs(n=3, k=2, m=4, b=1, h=2, d=16, dtype=torch.float32):
    context = [torch.randn(n, k, h, d, dtype=dtype) for _ in range(3)]
    return {
        "context_query": context[0],
        "context_key": context[1],
        "context_value": context[2],
        "state_query": torch.randn(n, h, d, dtype=dtype),
        "key": torch.randn(b, m, h, d, dtype=dtype),
        "value": torch.randn(b, m, h, d, dtype=dtype),
    }


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"key": torch.randn(1, 4, 2, 8)}, ShapeError, ["head dimension 8", "16"]),
        ({"key": torch.randn(1, 4, 3, 16)}, ShapeError, ["3 heads", "2"]),
        ({"key": torch.randn(4, 2, 16)}, ShapeError, ["(4, 2, 16)", "(B, m, H, D)"]),
        ({"key": torch.randn(1, 0, 2, 16)}, ShapeError, ["(1, 0, 2, 16)", "at least 1"]),
        ({"value": torch.randn(1, 5, 2, 16)}, ShapeError, ["value has shape (1, 5, 2, 16)", "(1, 4, 2, 16)"]),
        ({"context_query": torch.randn(2, 16)}, ShapeError, ["(2, 16)", "(N, k, H, D)"]),
        (
            {"context_key": torch.randn(3, 1, 2, 16)},
            ShapeError,
            ["context_key has shape (3, 1, 2, 16)", "(3, 2, 2, 16)"],
        ),
        ({"state_query": torch.randn(2, 2, 16)}, ShapeError, ["state_query has shape (2, 2, 16)", "(3, 2, 16)"]),
        ({"key_lengths": torch.tensor([5])}, ShapeError, ["5", "0..4"]),
        ({"key_lengths": torch.tensor([-1])}, ShapeError, ["-1", "0..4"]),
        ({"key_lengths": torch.tensor([1, 1])}, ShapeError, ["(2,)", "(1,)"]),
        ({"key_lengths": torch.tensor([1.0])}, DtypeError, ["float32", "int64"]),
        ({"value": torch.randn(1, 4, 2, 16).half()}, DtypeError, ["value has dtype torch.float16", "torch.float32"]),
        ({"key": torch.ones(1, 4, 2, 16, dtype=torch.int32)}, DtypeError, ["torch.int32", "torch.bfloat16"]),
        ({"key": [1.0]}, DtypeError, ["key is a list", "torch.Tensor"]),
        ({"context_value": None}, DtypeError, ["context_value is None", "state_query"]),
        ({"scale": float("nan")}, ShapeError, ["scale is nan", "finite"]),
        ({"context_key": None}, DtypeError, ["both None", "own_logits"]),
        (
            {"own_logits": torch.zeros(3, 2, 2, 2)},
            DtypeError,
            ["context_key and own_logits are both given", "one of them"],
        ),
        (
            {"context_key": None, "own_logits": torch.zeros(3, 2, 2)},
            ShapeError,
            ["own_logits has shape (3, 2, 2)", "(3, 2, 2, 2)"],
        ),
        (
            {"context_key": None, "own_logits": torch.zeros(3, 2, 2, 2).half()},
            DtypeError,
            ["own_logits has dtype torch.float16", "torch.float32"],
        ),
        ({"candidate_ids": torch.tensor([[0, 3]])}, ShapeError, ["candidate_ids reaches from 0 to 3", "0..2"]),
        ({"candidate_ids": torch.tensor([[-1]])}, ShapeError, ["-1", "0..2"]),
        ({"candidate_ids": torch.tensor([0])}, ShapeError, ["candidate_ids has shape (1,)", "(1, n)"]),
        ({"candidate_ids": torch.tensor([[0.0]])}, DtypeError, ["candidate_ids", "float32", "int64"]),
        ({"candidate_offsets": torch.tensor([0, 2])}, ShapeError, ["[0, 2]", "end at 3"]),
        ({"candidate_offsets": torch.tensor([1, 3])}, ShapeError, ["[1, 3]", "start at 0"]),
        ({"candidate_offsets": torch.tensor([0, 3, 3])}, ShapeError, ["(3,)", "(2,)", "B + 1"]),
        (
            {
                "key": torch.randn(2, 4, 2, 16),
                "value": torch.randn(2, 4, 2, 16),
                "candidate_offsets": torch.tensor([0, 4, 3]),
            },
            ShapeError,
            ["[0, 4, 3]", "never to decrease"],
        ),
        ({"context_scales": (torch.ones(3, 2, 2),) * 3}, DtypeError, ["context_scales", "torch.float32", "int8"]),
        ({"context_scales": (torch.ones(3, 2, 2),) * 2}, ShapeError, ["2 tensors", "3"]),
        ({"context_query": torch.ones(3, 2, 2, 16, dtype=torch.int8)}, DtypeError, ["context_key", "int8"]),
    ],
)
def test_a_mistake_is_named_with_found_and_expected(changes, error, words):
    with pytest.raises(error) as caught:
        candidate_attention(**{**inputs(), **changes})
    for word in words:
        assert word in str(caught.value)


def test_per_query_candidates_of_another_batch_point_to_the_pool_form():
    wrong = {name: tensor.unsqueeze(0).expand(3, *tensor.shape) for name, tensor in list(inputs().items())[:4]}
    with pytest.raises(ShapeError, match=r"3 queries.*pass a pool"):
        candidate_attention(**{**inputs(b=2), **wrong})


def test_another_device_is_named():
    with pytest.raises(mixkernels.DeviceError, match="value is on meta but key is on cpu"):
        candidate_attention(**{**inputs(), "value": torch.randn(1, 4, 2, 16, device="meta")})


def test_no_candidates_give_empty_results():
    result = candidate_attention(**inputs(n=0), return_lse=True)
    assert result.context.shape == (1, 0, 2, 2, 16)
    assert result.state.shape == (1, 0, 2, 16)
    assert result.state_lse.shape == (1, 0, 2)


def test_every_operator_tells_the_compiler_that_it_can_be_traced():
    assert mixkernels.score_candidates  # its module registers the operators other than attention
    every = [name.partition("::") for name in torch._C._dispatch_get_all_op_names()]
    names = {name for namespace, _, name in every if namespace == "mixkernels"}
    assert {"candidate_attention", "candidate_attention_backward", "score_top_k"} <= names
    for name in names:
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.mixkernels, name).default.tags, name


def test_auto_takes_torch_on_a_cpu():
    assert mixkernels.select_backend("auto", torch.randn(3, 1, 2, 16)) == "torch"


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(BackendError, match="no backend 'cuda'; backends are triton, torch, reference"):
        candidate_attention(**inputs(), backend="cuda")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d": 48}, ["head dimension 48 is not one of 16, 32, 64, 128"]),
        ({"k": 17}, ["17 context embeddings", "more than 16"]),
        ({"dtype": torch.float64}, ["torch.float64 is not one of"]),
        ({"d": 48, "k": 17}, ["head dimension 48", "17 context embeddings"]),
    ],
)
def test_an_unusable_backend_raises_one_error_with_every_reason(changes, words):
    with pytest.raises(BackendError) as caught:
        candidate_attention(**inputs(**changes), backend="triton")
    message = str(caught.value)
    for word in [*words, '"torch": can run it', '"reference": can run it']:
        assert word in message


def test_ids_with_per_query_candidates_are_refused():
    wrong = {name: tensor.unsqueeze(0) for name, tensor in list(inputs().items())[:4]}
    with pytest.raises(ShapeError, match=r"candidate_ids was given with per-query candidates"):
        candidate_attention(**{**inputs(), **wrong}, candidate_ids=torch.tensor([[0]]))


def test_the_environment_chooses_a_backend_where_the_call_does_not(monkeypatch):
    monkeypatch.setenv("MIXKERNELS_BACKEND", "reference")
    assert mixkernels.select_backend(None, torch.randn(3, 1, 2, 16)) == "reference"
    assert mixkernels.select_backend("torch", torch.randn(3, 1, 2, 16)) == "torch"
    monkeypatch.setenv("MIXKERNELS_BACKEND", "fastest")
    with pytest.raises(BackendError, match="no backend 'fastest'"):
        candidate_attention(**inputs())


@pytest.mark.gpu
def test_ranges_are_checked_on_a_gpu_when_asked_for(monkeypatch):
    tensors = {name: tensor.cuda() for name, tensor in inputs().items()}
    monkeypatch.setenv("MIXKERNELS_CHECKS", "1")
    with pytest.raises(ShapeError, match="candidate_ids reaches from 3 to 3"):
        candidate_attention(**tensors, candidate_ids=torch.tensor([[3]], device="cuda"))


def test_triton_says_which_gradients_it_cannot_give():
    wide = {name: tensor.requires_grad_() for name, tensor in inputs(k=16, d=128).items()}
    with pytest.raises(BackendError, match="float32 gradients at head dimension 128 take at most 15"):
        candidate_attention(**wide, backend="triton")
    candidates = {f"context_{name}": torch.ones(3, 2, 2, 16, dtype=torch.int8) for name in ("query", "key", "value")}
    key = torch.randn(1, 4, 2, 16, requires_grad=True)
    with pytest.raises(BackendError, match="int8 candidates have no gradients here"):
        candidate_attention(
            **{**inputs(), **candidates, "key": key}, context_scales=(torch.ones(3, 2, 2),) * 3, backend="triton"
        )


def run_python(code: str, **environment: str) -> str:
    import os

    env = {**os.environ, **environment}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK_TRITON = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("blocked", name=name)
sys.meta_path.insert(0, Block())
"""


def test_both_packages_import_and_run_where_triton_is_missing():
    out = run_python(
        BLOCK_TRITON
        + """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch, mixkernels, mixencoder
from mixencoder import MixEncoderModel
q = torch.randn(2, 1, 2, 16); k = torch.randn(1, 3, 2, 16)
print(mixkernels.candidate_attention(q, q, q, None, k, k).context.shape)
print(mixkernels.not_supported_reasons("triton"))
x, w = torch.randn(3, 2, 8), torch.ones(8)
out = mixkernels.residual_layer_norm(x, x, w, w)
print(mixkernels.score_candidates(out, x, out[:, 0], x[:, 0], w, w, top_k=2).ids.shape)
"""
    )
    context, reasons, ids = out.splitlines()
    assert context == "torch.Size([1, 2, 1, 2, 16])"
    assert "triton is not installed" in reasons
    assert ids == "torch.Size([2])"


def test_importing_is_light_and_kernels_know_no_model():
    out = run_python(
        """
import sys, mixkernels, mixencoder
print(sorted({"torch", "triton", "transformers"} & set(sys.modules)))
before = set(sys.modules)
mixkernels.candidate_attention
import mixkernels.roofline
new = set(sys.modules) - before
ours = [name for name in new if name.startswith("mixkernels")]
print("torch" in new, [name for name in new if name.startswith(("mixencoder", "transformers"))])
print([name for name in ours if ".triton_" in name])
"""
    )
    assert out.splitlines() == ["[]", "True []", "[]"]
