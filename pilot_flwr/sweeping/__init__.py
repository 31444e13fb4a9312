"""Sweeps: many runs from one command, their results in one file, and tables of these."""
