"""What users ask: a plan, targets, what-if."""
