"""The SplitQuant idea, read from `splitquant`: prepare, select, split, build, check and record, a file each.

`base` is what every pass has in common, `splitquant` the pass itself, whose steps are the files beside it.
"""
