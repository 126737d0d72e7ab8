"""The Triton kernel's launch rule, and its compilation for GPUs that are not here."""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from mixkernels.triton_backend.attention_forward import launch_config  # noqa: E402
from mixkernels.triton_backend.support import HEAD_DIMS, MAX_CONTEXT  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_launch_holds_whole_candidates_and_wastes_few_rows(dtype, head_dim):
    for slots in range(1, MAX_CONTEXT + 2):
        config = launch_config(slots, head_dim, dtype)
        candidates = config.block_m // slots
        assert candidates >= 1
        assert config.block_m & (config.block_m - 1) == 0
        assert config.block_n >= 16
        assert candidates * slots >= 0.85 * config.block_m


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mixkernels.triton_backend.attention_forward import candidate_attention_fwd_kernel as kernel, launch_config
import torch
backend, arch, warp, k, d = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
arch = int(arch) if arch.isdigit() else arch
config = launch_config(k + 1, d, torch.bfloat16)
constants = dict(H=12, K=k, D=d, HAS_STATE=True, HAS_LENGTHS=True, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                 INTERPRET=False)
signature = {}
for name in kernel.arg_names:
    if name in constants: signature[name] = "constexpr"
    elif name == "key_lengths_ptr": signature[name] = "*i64"
    elif name.endswith("lse_ptr"): signature[name] = "*fp32"
    elif name.endswith("_ptr"): signature[name] = "*bf16"
    elif name == "scale": signature[name] = "fp32"
    else: signature[name] = "i32"
compiled = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget(backend, arch, warp),
                          options={"num_warps": config.num_warps, "num_stages": config.num_stages})
print(json.dumps({"kinds": sorted(compiled.asm), "shared": compiled.metadata.shared}))
"""


@pytest.mark.parametrize(("k", "d"), [(1, 64), (3, 32), (7, 64)])
@pytest.mark.parametrize("target", [("cuda", "90", "32"), ("hip", "gfx942", "64")], ids=["sm_90", "gfx942"])
def test_the_kernel_compiles_ahead_of_time_without_a_gpu(target, k, d, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *target, str(k), str(d)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = "cubin" if target[0] == "cuda" else "hsaco"
    assert f'"{kinds}"' in done.stdout
