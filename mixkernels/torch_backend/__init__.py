"""The fast path without Triton: CPU first, any device."""
