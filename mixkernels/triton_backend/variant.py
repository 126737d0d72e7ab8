"""One compiled form of a kernel, described so that it can be built for a GPU that is not here."""

from typing import Any, NamedTuple


class KernelVariant(NamedTuple):
    """A kernel in one shipped launch configuration. Every kernel module has ``variants() -> list[KernelVariant]``."""

    kernel: Any
    """The ``triton.jit`` function."""
    config: str
    """What tells it from the kernel's other variants, such as "k=1 D=64 bfloat16"."""
    signature: dict[str, str]
    """Triton type of every argument that is no constexpr, such as "*bf16" or "i32"."""
    constants: dict[str, Any]
    """Value of every constexpr argument."""
    num_warps: int
    num_stages: int
