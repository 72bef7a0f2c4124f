"""transformers' `save_pretrained` and `from_pretrained` for split models."""
