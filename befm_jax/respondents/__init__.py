"""Whoever answers items: the engine, recorded answers, baselines."""
