"""The paper's mathematics: no Flower, no files, torch and numpy alone."""
