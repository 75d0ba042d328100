"""Studies: placements, routings and workloads simulated against each other."""
