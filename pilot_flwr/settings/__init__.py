"""Typed, frozen, validated settings."""
