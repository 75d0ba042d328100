"""A stage: a loaded layer range with its KV cache, run exactly as it is served."""
