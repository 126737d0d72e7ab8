"""Describe one compiled form of a kernel, so that it can be compiled without its GPU."""

from typing import Any, NamedTuple


class KernelVariant(NamedTuple):
    """A kernel in one shipped launch configuration. Every kernel module has ``variants() -> list[KernelVariant]``."""

    kernel: Any
    """The ``triton.jit`` function."""
    config: str
    """What distinguishes it from the kernel's other variants, such as "k=1 D=64 bfloat16"."""
    signature: dict[str, str]
    """Triton type of every argument that is not a constexpr, such as "*bf16" or "i32"."""
    constants: dict[str, Any]
    """Value of every constexpr argument."""
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()
    """Arguments that are multiples of 16 (pointers: of 16 bytes), so that loads can be 128 bits wide."""
    arch: str | None = None
    """The one architecture of `mixkernels.resources.ARCHS` that it is launched on; None: any."""

    logits: int = 0
    """Of attention kernels: logits of one turn of the hottest loop, of rows that exist in a full tile."""

    @property
    def attributes(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """``attrs`` of triton's ASTSource, as a launch with such arguments specialises the kernel."""
        return {(self.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in self.divisible}
