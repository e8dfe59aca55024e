"""Inference: exact scores of answer sets, and populations sampled from a shared prompt."""
