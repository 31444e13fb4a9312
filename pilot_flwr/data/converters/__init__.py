"""Other data sets' annotation files as LLaVA JSONL."""
