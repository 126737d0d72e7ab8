"""Every error that mixkernels raises on purpose; callers catch `MixKernelsError` or a subclass."""


class MixKernelsError(Exception):
    """Base of all errors raised by mixkernels."""


class ShapeError(MixKernelsError, ValueError):
    """Sizes that must agree do not, or a size or a length is out of range."""


class DtypeError(MixKernelsError, TypeError):
    """A tensor has a dtype that the operator does not take, or inputs do not share one dtype."""


class DeviceError(MixKernelsError, ValueError):
    """Inputs are on different devices, or a device is unknown or not on this machine."""


class BackendError(MixKernelsError, RuntimeError):
    """The chosen backend, or every backend, cannot run this call; the message says why."""
