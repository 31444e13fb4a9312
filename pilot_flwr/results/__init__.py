"""Using what came out of a run: score it, ask it, export it."""
