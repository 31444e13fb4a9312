"""Data: what an example is, where examples come from, how they become tokens."""
