"""One client: who it is, what it trains, what it keeps."""
