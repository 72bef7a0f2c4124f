"""The demo's own task and model: a generated corpus, and a BERT-Tiny trained on it on the spot."""
