"""Runs that are killed and resumed, compared bit by bit with one that was not."""
