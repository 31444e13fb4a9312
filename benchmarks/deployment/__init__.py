"""A deployment on this machine, measured: what an exchange costs besides training."""
