"""Models on disk: files written at once or not at all, safetensors read with care, and transformers' folders."""
