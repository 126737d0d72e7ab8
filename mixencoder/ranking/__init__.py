"""How a MixEncoder scores.

Texts and tensors: `pairs`. Indexes, from the outside in: `indexing` (what an index needs of a model), `index_ranker`,
`streaming` (pieces of candidates and the best so far), `candidate_buffer` (a piece in memory), `interaction` (the
layers) on `feed_forward`, `linear` and `workspace`; on a GPU also `cuda_graphs` and `pinned_memory`. `record_format`
says how a candidate is stored; `weights_version`, `identity` and `query_cache` what stays valid, and how long.
"""
