"""The package's own plugins: splitters, layer types, activations and BatchNorm folding, one file each."""
