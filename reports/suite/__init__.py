"""The whole chain on a suite of testbeds and workloads."""
