"""The command line tool `pilot-flwr`."""
