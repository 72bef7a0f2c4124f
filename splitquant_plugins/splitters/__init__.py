"""Strategies that turn a tensor into parts, one file each."""
