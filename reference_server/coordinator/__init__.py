"""Where requests enter and tokens leave: the engine, and the load of a benchmark."""
