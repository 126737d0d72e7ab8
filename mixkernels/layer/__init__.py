"""The rest of an interaction layer: residual and gate with their LayerNorm, and scores; one module for each backend."""
