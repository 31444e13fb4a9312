"""One client: identity, training, private state."""
