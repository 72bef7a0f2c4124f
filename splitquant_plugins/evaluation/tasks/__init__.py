"""Kinds of models: how each is loaded, what data it takes, and what it is measured by."""
