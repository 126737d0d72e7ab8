"""Explain one score: what a MixEncoder's interaction layers attend to, and the terms of the score.

`result` holds what `MixEncoder.explain` returns, `attention` computes it, `picture` draws it.
"""
