"""The base model with Pilot's adapters, and plans from its shapes."""
