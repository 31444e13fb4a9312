"""Reports of runs and sweeps: one HTML page and PNG files."""
