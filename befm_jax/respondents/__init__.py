"""Respondents: the engine, recorded answers, baselines."""
