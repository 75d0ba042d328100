"""The cost model: seconds of an iteration of a stage, and how it is fitted."""
