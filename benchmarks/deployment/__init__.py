"""Measure a deployment on this machine: the cost of an exchange besides training."""
