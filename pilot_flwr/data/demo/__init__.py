"""The demo: tasks over mosaics of scanned handwritten digits."""
