"""How a MixEncoder scores candidates and ranks indexes. `mixencoder.fast` is the caller.

Candidates given as texts or tensors: `pairs` runs the model itself.

An index of candidates: `index_encoder` creates, fills and opens it; `record_format` says what it stores of a candidate;
`fingerprint` says whether a model may rank it and add to it. It is ranked by a faster implementation without gradients,
in which each file calls the next ones:

================== ================================================================
`index_ranker`     documents of an index -> rankings with ids and texts
`streaming`        chunks of stored candidates -> the top k
`candidate_buffer` chunks -> pieces of fixed size, in memory -> their scores
`interaction`      the interaction layers, for one piece and one query
`feed_forward`     the FFN of a layer
`linear`           linear layers, in floating point or int8
`workspace`        memory for intermediate results, kept from call to call
================== ================================================================

`plan` has the sizes of pieces for a device, `piece_sizes` finds those in which a candidate's bits do not depend on its
row, `cuda_graphs` and `pinned_memory` are for a GPU.

`weights_version` notices changed weights. Then everything computed from the old ones is dropped: encoded queries in
`query_cache`, hashes of the weights in `identity`, prepared weights in `index_ranker`.
"""
