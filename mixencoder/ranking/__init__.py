"""How a MixEncoder scores candidates and ranks indexes. `mixencoder.fast` is the caller.

Candidates given as texts or tensors: `pairs` runs the model itself.

Candidates of an index: a faster implementation without gradients. Each file calls those below it.

======================== ===========================================================================
`indexing`               create, fill and open an index for a model
`index_ranker`           documents of an index -> rankings with ids and texts
`streaming`              chunks of stored candidates -> the top k
`candidate_buffer`       chunks -> pieces of fixed size in memory -> their scores
`interaction`            the interaction layers, for one piece and one query
`feed_forward`           the FFN of a layer
`linear`                 linear layers, in floating point or int8
`workspace`              memory for intermediate results, kept from call to call
======================== ===========================================================================

Beside them: `record_format` (what is stored of a candidate), `plan` (sizes of pieces for a device), `piece_sizes`
(which of them give a candidate the same bits in every row), `cuda_graphs` and `pinned_memory` (for a GPU).

`weights_version` notices changed weights. By it, `query_cache` keeps encoded queries and `identity` hashes of the
weights.
"""
