"""Commands that need nodes: each parses its options into one configuration and calls one function."""
