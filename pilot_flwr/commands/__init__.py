"""The commands of ``pilot-flwr``, a module each."""
