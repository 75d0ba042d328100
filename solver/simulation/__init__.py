"""The serving rules on a virtual clock."""
