"""Testbeds: put agents on nodes of this machine or others, and take everything away again."""
