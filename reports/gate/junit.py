"""Gate cases as JUnit XML: failed is a failure, not measured is an error, undecided is skipped."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from helixbench.reports.gate.cases import Case, Status

_TAGS = {Status.FAILED: "failure", Status.ERROR: "error", Status.UNDECIDED: "skipped"}


def junit_xml(cases: Sequence[Case], *, is_strict: bool = False) -> str:
    """One ``testsuite`` per suite of the cases, in their order. With ``is_strict`` undecided cases are failures."""
    tags = _TAGS | ({Status.UNDECIDED: "failure"} if is_strict else {})
    root = ET.Element("testsuites", _counts(cases, tags), name="helixbench")
    for suite in dict.fromkeys(case.suite for case in cases):
        own = [case for case in cases if case.suite == suite]
        element = ET.SubElement(root, "testsuite", _counts(own, tags), name=f"helixbench.{suite}")
        for case in own:
            _add_case(element, case, tags)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_case(suite: ET.Element, case: Case, tags: dict[Status, str]) -> None:
    element = ET.SubElement(suite, "testcase", classname=f"helixbench.{case.suite}", name=_clean(case.name), time="0")
    text = _clean("\n".join([case.message, *case.details]))
    if case.status is Status.PASSED:
        ET.SubElement(element, "system-out").text = text
        return
    ET.SubElement(element, tags[case.status], message=_clean(case.message), type=case.status).text = text


def _counts(cases: Sequence[Case], tags: dict[Status, str]) -> dict[str, str]:
    found = [tags.get(case.status) for case in cases]
    return {
        "tests": str(len(cases)),
        "failures": str(found.count("failure")),
        "errors": str(found.count("error")),
        "skipped": str(found.count("skipped")),
    }


def _clean(text: str) -> str:
    """Drop the characters that XML 1.0 cannot represent."""
    return "".join(
        char for char in text if char in "\t\n\r" or " " <= char <= "\ud7ff" or "\ue000" <= char <= "\U0010ffff"
    )
