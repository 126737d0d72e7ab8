"""First stages: what hands a few documents of an index to the interaction, without reading all of them.

`protocol` says what one is and checks what it returns; `vector_index` is one over a vector index of the dual term's
vectors, kept in a folder beside the index; `libraries` holds FAISS and usearch. docs/scale.md is the guide.
"""

from mixencoder.first_stage.protocol import FirstStage
from mixencoder.first_stage.vector_index import VectorIndex

__all__ = ["FirstStage", "VectorIndex"]
