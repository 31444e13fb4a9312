"""The command line tool ``pilot-flwr``: parse, call the packages below, print."""
