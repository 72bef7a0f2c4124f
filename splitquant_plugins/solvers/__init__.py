"""Numerics that splitters and decoupleQ share: tensors in, tensors out."""
