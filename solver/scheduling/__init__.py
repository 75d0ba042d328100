"""The serving rules, pure: the server, the simulator and `expected` run this code."""
