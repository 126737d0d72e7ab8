"""Name of the package's library of PyTorch operators: ``torch.ops.<NAMESPACE>``."""

NAMESPACE = __name__.partition(".")[0]
"""The name under which the package was imported, "mixkernels". Hugging Face's `kernels` imports a copy under a name of
its own, so that two versions can stand in one process."""
