"""Many machines, on an engine that others keep: building a sharded index with Ray Data, ranking it in Ray actors.

`plan` cuts files into shards and builds one of them; it knows nothing of Ray. `ray_build` runs it on Ray Data, and
`ray_shards` ranks the shards.
docs/scale.md is the guide.
"""
