"""A site's side of a federation: answer Flower's messages, here or in a warm service."""
