"""Odd inputs for everything that reads from outside; see ``run.py``."""
