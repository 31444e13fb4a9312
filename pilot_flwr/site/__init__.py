"""A site's side of a federation: answer messages, in the ClientApp or in a warm service."""
