"""Open a finished run: evaluate, generate, export, merge."""
