"""Modules that are copied into exported models."""
