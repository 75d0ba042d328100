"""Gate answers as JUnit XML: failures are failures, what could not be measured is an error, undecided is skipped."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from helixbench.reports.gate.cases import Case, Status

_TAGS: dict[Status, str] = {"failed": "failure", "error": "error", "undecided": "skipped"}


def junit_xml(cases: Sequence[Case]) -> str:
    """One ``testsuite`` per suite of the cases, in their order."""
    root = ET.Element("testsuites", _counts(cases), name="helixbench")
    for suite in dict.fromkeys(case.suite for case in cases):
        own = [case for case in cases if case.suite == suite]
        element = ET.SubElement(root, "testsuite", _counts(own), name=f"helixbench.{suite}")
        for case in own:
            _add_case(element, case)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_case(suite: ET.Element, case: Case) -> None:
    element = ET.SubElement(suite, "testcase", classname=f"helixbench.{case.suite}", name=_clean(case.name), time="0")
    text = "\n".join([case.message, *case.details])
    if case.status == "passed":
        ET.SubElement(element, "system-out").text = _clean(text)
        return
    problem = ET.SubElement(element, _TAGS[case.status], message=_clean(case.message))
    if case.status != "undecided":
        problem.set("type", case.status)
    problem.text = _clean(text)


def _counts(cases: Sequence[Case]) -> dict[str, str]:
    return {
        "tests": str(len(cases)),
        "failures": str(sum(case.status == "failed" for case in cases)),
        "errors": str(sum(case.status == "error" for case in cases)),
        "skipped": str(sum(case.status == "undecided" for case in cases)),
    }


def _clean(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold."""
    return "".join(
        char for char in text if char in "\t\n\r" or " " <= char <= "\ud7ff" or "\ue000" <= char <= "\U0010ffff"
    )
