"""Splitting and quantizing a checkpoint that does not fit in memory: layer by layer, shard by shard.

`headers` reads and writes what stands before the data of a safetensors file, `source` is a checkpoint to read
from, `writer` a shard to be written, `layout` says what becomes of each tensor and in which shard,
`workplace` the half-done output, `pipeline` keeps the cores busy within a memory budget,
and `run` puts them together.
"""
