"""``mixencoder info``: versions, devices and attention backends."""

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

from mixencoder.errors import MixEncoderError


def info() -> None:
    """Print versions, devices, and which attention backend is used and why."""
    import torch

    from mixencoder.bundled import default_checkpoint
    from mixkernels import BACKENDS, not_supported_reasons

    table = Table(show_header=False, box=None, pad_edge=False)
    for package in ("mixencoder", "torch", "triton", "transformers", "numpy", "safetensors"):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "installed" if importlib.util.find_spec(package) else "not installed"
        table.add_row(package, found)
    table.add_row("python", sys.version.split()[0])
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    cpu = f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    table.add_row("devices", ", ".join([*devices, cpu]))
    for name in BACKENDS:
        reasons = not_supported_reasons(name)
        table.add_row(f"backend {name}", "can run" if not reasons else f"cannot run: {', '.join(reasons)}")
    chosen = "triton" if not not_supported_reasons("triton") and torch.cuda.is_available() else "torch"
    why = "there is a GPU" if chosen == "triton" else "the fastest backend that can run on a CPU"
    table.add_row("backend auto", f"{chosen}: {why}")
    try:
        table.add_row("default model", str(default_checkpoint()))
    except MixEncoderError as error:
        table.add_row("default model", str(error))
    Console(highlight=False, soft_wrap=True).print(table)
