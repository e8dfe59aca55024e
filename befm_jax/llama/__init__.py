"""Llama in Flax: the architecture, its weights on disk and its tokenizer.

Knows nothing of adapters, data or training: every matrix product goes through `linear.dot`, and
every attention through the strategy that the caller passes in.
"""
