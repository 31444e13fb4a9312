"""Start a run: simulation, in-process, or an existing SuperLink."""
