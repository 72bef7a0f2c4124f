"""Recipes in files: what `splitquant compare` and `quantize` are asked for."""
