"""The base model with Pilot's adapters, and what is known of it from shapes."""
