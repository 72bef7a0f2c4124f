"""Splitting and quantizing a checkpoint that does not fit in memory: layer by layer, shard by shard.

`layout` says what becomes of each tensor and in which shard, `workplace` is the half-done output, `writer` a shard to
be written, and `shards` the work of each. `local` does it in this process, which keeps the cores busy
within a memory budget; `cluster` has it done on other machines, whose side is `worker`, by what a `job` tells them.
`run` puts them together.
"""
