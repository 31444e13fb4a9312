"""Local training on a GPU against a plain loop and against the arithmetic; see ``run.py``."""
