"""Encoding with many workers, on an engine that others keep: a sharded index built with Ray Data.

`plan` cuts files into shards and builds one of them; it knows nothing of Ray. `ray_build` runs it on Ray Data.
docs/scale.md is the guide.
"""
