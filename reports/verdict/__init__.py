"""Whether a run met its prediction, and what explains a difference."""
