import os

# As nodes have it, and before torch is imported, by conftest.py among others: OpenMP reads it only then. Threads that
# wait for each other on busy cores take many times longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
