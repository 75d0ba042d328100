"""Profile a heterogeneous cluster, place a model on it with a proven bound, serve it, and check the prediction.

The four packages lie at the root of the repository and are installed as ``helixbench.profiler``, ``helixbench.solver``,
``helixbench.reference_server`` and ``helixbench.reports``.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
if (_ROOT / "pyproject.toml").is_file():  # a checkout that is not installed
    __path__.append(str(_ROOT))
