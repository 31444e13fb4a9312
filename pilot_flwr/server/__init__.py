"""The server: who takes part, what a round changes, what is written down."""
