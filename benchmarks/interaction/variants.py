"""What is tried: each variant differs from `BASE` in what its name says."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Variant:
    """One way to build and train the layers on top of a frozen encoder."""

    what: str
    """What differs, for the table."""
    form: str = "mean"
    """Contexts of a candidate (`benchmarks.interaction.encodings.Documents`), or "mean+NAME"."""
    contexts: int = 1
    """k"""
    layers: tuple[int, ...] = (-1,)
    """Layers of the encoder that the interaction reads: -1, -2, or both."""
    score: str = "dot"
    """"dot": ``h . e``, which starts small (the library's start). "gain": times a learned factor that starts at zero.
    "cosine": ``s cos(h, e)`` with a learned s."""
    interacts: bool = True
    """False: the dual term alone."""
    heads: str = "none"
    """Residual layers on the vectors of the dual term: "none", "query", or "both"."""
    mined: int = 0
    """Most similar wrong documents in a list."""
    others: int = 15
    """Other queries' right documents in a list."""
    own_loss: float = 0.5
    """Weight of the loss on the interaction alone."""
    gated: bool = False
    """Whether the interaction's share depends on the pair; learned afterwards, on sources kept for it."""
    teacher: bool = False
    """Whether lists are also taught by a larger encoder."""
    teacher_weight: float = 0.7
    teacher_scale: float = 20.0
    """Factor of the teacher's cosines."""
    rate: float = 3e-4
    steps: int = 2000


BASE = Variant("the library's start: k = 1, last layer, h . e, random negatives")
_HARD = {"mined": 8, "others": 7}

VARIANTS: dict[str, Variant] = {
    "base": BASE,
    "heads": replace(BASE, what="no interaction: residual heads on both vectors", interacts=False, heads="both"),
    "query-head": replace(BASE, what="no interaction: residual head on the query", interacts=False, heads="query"),
    # (a) lists in which the dual term is wrong
    "mined": replace(BASE, what="8 mined and 7 random negatives", **_HARD),
    "mined-only": replace(BASE, what="15 mined negatives", mined=15, others=0),
    "heads-mined": replace(
        BASE, what="no interaction: heads on both vectors, 8 mined negatives", interacts=False, heads="both", **_HARD
    ),
    "mined-with-heads": replace(BASE, what="interaction beside heads on both vectors, 8 mined", heads="both", **_HARD),
    # (b) the start
    "gain": replace(BASE, what="gain that starts at zero, 8 mined", score="gain", own_loss=0.0, **_HARD),
    "cosine": replace(BASE, what="cosine of h and e, 8 mined", score="cosine", **_HARD),
    # (c) contexts
    "spans-4": replace(BASE, what="k = 4 spans, 8 mined", form="spans-4", contexts=4, **_HARD),
    "spans-8": replace(BASE, what="k = 8 spans, 8 mined", form="spans-8", contexts=8, **_HARD),
    "codes-4": replace(BASE, what="k = 4 random codes, 8 mined", form="codes-4", contexts=4, **_HARD),
    "mean-and-codes": replace(
        BASE, what="mean beside 3 random codes, 8 mined", form="mean+codes-4", contexts=4, **_HARD
    ),
    "directions-4": replace(BASE, what="k = 4 principal directions, 8 mined", form="directions-4", contexts=4, **_HARD),
    "mean-and-spans": replace(BASE, what="mean beside 3 spans, 8 mined", form="mean+spans-4", contexts=4, **_HARD),
    # (d) layers
    "layer-before": replace(BASE, what="the layer before the last, 8 mined", layers=(-2,), **_HARD),
    "two-layers": replace(BASE, what="two layers, 8 mined", layers=(-2, -1), **_HARD),
    # (e) a share for each pair
    "gated": replace(BASE, what="a share for each pair, learned on two other sources, 8 mined", gated=True, **_HARD),
    # (f) a teacher
    "taught": replace(BASE, what="taught by all-mpnet-base-v2, 8 mined", teacher=True, **_HARD),
    "taught-heads": replace(
        BASE,
        what="no interaction: heads taught by all-mpnet-base-v2",
        interacts=False,
        heads="both",
        teacher=True,
        **_HARD,
    ),
    "taught-spans-4": replace(BASE, what="k = 4 spans, taught", form="spans-4", contexts=4, teacher=True, **_HARD),
    # (g) longer
    "longer": replace(BASE, what="8 mined, 10,000 steps", steps=10000, **_HARD),
}
