"""Verdicts as terminal output, HTML and Markdown."""
