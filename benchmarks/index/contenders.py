"""Sizes and names of what `benchmarks.index.speed` times, which its limits and tables share."""

QUERY_TOKENS, DOCUMENT_TOKENS, TOP_K = 16, 128, 10
CROSS_PAIRS = 32
"""Pairs that the cross-encoder is timed on; its time grows with their number, and is scaled to N."""
CROSS = f"cross-encoder, {CROSS_PAIRS} pairs"
PLAIN, DUAL, LATE = "plain eager", "dual-encoder", "late interaction"
ON_DISK = "text to ranking, index on disk, projected float16"
DEFAULT = ", default"
"""Suffix of names: with the settings of the bundled checkpoint."""
NARROW = ", bfloat16 model"
"""Suffix of names, before `DEFAULT`: a model in bfloat16; measured where the processor multiplies it natively."""
NARROW_ON_DISK = f"text to ranking, index on disk, projected bfloat16{NARROW}"
