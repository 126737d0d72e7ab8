"""The formulas in plain PyTorch, nothing else: the oracle of every other backend. Differentiable, float64-able."""
