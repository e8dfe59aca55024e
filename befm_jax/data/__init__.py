"""Data: examples, games, the people who played them, and token forests."""
