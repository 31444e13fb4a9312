"""A run's folder, whoever reads it."""
