"""The model on disk: its files, their dtypes, and synthetic models of any shape."""
