"""The package's own plugins: splitters, layer types, preparations and a backend, one file each."""
