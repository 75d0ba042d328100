"""Which node holds which layers: the search."""
