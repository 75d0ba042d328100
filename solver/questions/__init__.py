"""From a user's question to a checked plan: one search, targets, what-ifs."""
