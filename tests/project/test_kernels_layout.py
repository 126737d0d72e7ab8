"""The folder that Hugging Face's `kernels` loads: made by `.ci/kernels_layout`, imported without this package."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "kernels_layout"

BY_IMPORT = """
import importlib.util, json, sys
from pathlib import Path

def load(folder):
    variant = Path(folder, "build", "torch-cpu")
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
BY_KERNELS = """
from pathlib import Path

from kernels import get_local_kernel

def load(folder):
    return get_local_kernel(Path(folder), backend="cpu")
"""
USE = """
import sys
from pathlib import Path
import torch

# neither this package nor a part of it can be imported under its own name
sys.modules["mixkernels"] = None
loaded = load(sys.argv[1])
generator = torch.Generator().manual_seed(0)
shapes = (9, 2, 3, 16), (9, 3, 16), (1, 5, 3, 16)
context, state, tokens = (torch.randn(*shape, generator=generator) for shape in shapes)
for backend in ("torch", "triton"):
    found = loaded.candidate_attention(context, context, context, state, tokens, tokens, backend=backend)
    logits = torch.einsum("nhd,mhd->nhm", state, tokens[0]) / 4
    expected = torch.einsum("nhm,mhd->nhd", logits.softmax(-1), tokens[0])
    torch.testing.assert_close(found.state[0], expected, rtol=1e-4, atol=1e-4)
    x, one = torch.randn(4, 48, generator=generator), torch.ones(48)
    normed = loaded.residual_layer_norm(x, x, one, one, backend=backend)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(2 * x, (48,), one, one), rtol=1e-4, atol=1e-4)
assert loaded.__name__.startswith("mixkernels_cpu_"), loaded.__name__
assert hasattr(getattr(torch.ops, loaded.__name__), "candidate_attention")
print("right")
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout") / "kernel"
    subprocess.run([sys.executable, SCRIPT, folder], check=True, capture_output=True)
    return folder


def test_every_backend_has_the_package_and_its_metadata(layout):
    ids = set()
    for backend in ("cpu", "cuda", "rocm"):
        variant = layout / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
        assert metadata["name"] == "mixkernels"
        assert metadata["backend"] == {"type": backend}
        ids.add(metadata["id"])
        assert (variant / "attention" / "launch_tables").is_dir()
        assert not list(variant.rglob("profile.py")) + list(variant.rglob("__pycache__"))
    assert len(ids) == 3
    assert "candidate_attention" in (layout / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("loader", ["import", "kernels"])
def test_a_copy_computes_under_a_name_of_its_own(layout, loader, tmp_path):
    # tests/kernels is importable as "kernels" too, so ask for the distribution
    if loader == "kernels" and not any(found.name == "kernels" for found in importlib.metadata.distributions()):
        pytest.skip("kernels is not installed; .ci/integrations installs it")
    program = (BY_IMPORT if loader == "import" else BY_KERNELS) + USE
    done = subprocess.run(
        [sys.executable, "-c", program, str(layout)],
        cwd=tmp_path,
        env={"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "right\n", done.stderr


def test_an_existing_folder_is_left_alone(layout):
    done = subprocess.run([sys.executable, SCRIPT, layout], capture_output=True, text=True)
    assert done.returncode == 1
    assert "exists; expected a new folder" in done.stderr
