"""Flower's messages and grids."""
