"""Functional transforms of the parameter tree: LoRA, and its files in PEFT's format."""
