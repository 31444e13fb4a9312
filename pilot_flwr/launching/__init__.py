"""Runs started, followed, judged and ended."""
