"""Data: examples from any source, assigned to clients, validated, tokenized.

Errors are `DataError` or `ConfigError`. They name file and row and never quote a row, because they
may travel to the server.
"""
