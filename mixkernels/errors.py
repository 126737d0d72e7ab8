"""Every error that mixkernels raises on purpose; callers catch `MixKernelsError` or one of its kinds."""


class MixKernelsError(Exception):
    """Base of all errors raised by mixkernels."""


class ShapeError(MixKernelsError, ValueError):
    """Sizes that must agree do not, or a size or a length lies outside its range."""


class DtypeError(MixKernelsError, TypeError):
    """A tensor has a dtype that the operator does not take, or inputs do not share one dtype."""


class DeviceError(MixKernelsError, ValueError):
    """Inputs lie on different devices."""


class BackendError(MixKernelsError, RuntimeError):
    """No backend, or not the chosen one, can run this call; the message lists every backend with every reason."""
