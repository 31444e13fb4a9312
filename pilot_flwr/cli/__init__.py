"""The command line tool ``pilot-flwr``: parse, call the rooms below, print."""
