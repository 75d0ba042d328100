"""Inside reports imports point one way as well: what is decided comes before how it is drawn."""

from __future__ import annotations

from tests.test_layering import ROOT, imports_of, module_of

ORDER = (
    "loading",
    "verdict",
    "formatting",
    "compare",
    "render",
    "output",
    "gate",
    "suite",
    "demo",
    "served_plan",
    "pytest_plugin",
    "schemas",
    "cli",
)


def test_imports_inside_reports_point_one_way() -> None:
    wrong = []
    for path in sorted((ROOT / "reports").rglob("*.py")):
        own = module_of(path).split(".")[2:3]
        for line, name in imports_of(path):
            parts = name.split(".")
            if own and parts[:2] == ["helixbench", "reports"] and ORDER.index(parts[2]) > ORDER.index(own[0]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []
