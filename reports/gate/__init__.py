"""Verdicts as exit codes and CI formats."""
