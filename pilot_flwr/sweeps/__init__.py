"""Hydra multiruns and their comparison."""
