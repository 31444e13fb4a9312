"""A federation over emoji of several houses: data, base models, and the comparison of methods."""
