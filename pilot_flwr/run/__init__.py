"""The run folder: events, tables, checkpoints."""
