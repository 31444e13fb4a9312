"""Scores of generated answers, by the rules of the data sets that they come from."""
