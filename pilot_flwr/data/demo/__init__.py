"""The demo's tasks over scans of handwritten digits."""
