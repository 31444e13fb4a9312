"""Local training on a GPU against a plain loop and the required arithmetic; see ``run.py``."""
