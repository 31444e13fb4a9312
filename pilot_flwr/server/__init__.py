"""The server's side: roster, event recorder, resuming."""
