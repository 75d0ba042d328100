"""The placement problem: workload, capacities, plan, and the independent checker of plans."""
