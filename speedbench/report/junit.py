"""JUnit XML: gates as test cases, for the CI systems that show such.

One suite per arm. A gate that fails is a failure; one that is inconclusive is skipped, which most
systems do not turn red: the exit code of the command does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from speedbench.report.blocks import clean
from speedbench.report.gate import METRICS, GateResult, change_in_words


def render(results: Sequence[GateResult], about: Mapping[str, str]) -> str:
    """The document. about: what every suite's properties tell beside the numbers."""
    root = ElementTree.Element("testsuites", {"name": "speedbench compare", **_counts(results)})
    for arm in dict.fromkeys(result.arm for result in results):
        mine = [result for result in results if result.arm == arm]
        root.append(_suite(arm, mine, about))
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _suite(
    arm: str, results: Sequence[GateResult], about: Mapping[str, str]
) -> ElementTree.Element:
    skipped = {"skipped": str(sum(result.outcome == "inconclusive" for result in results))}
    suite = ElementTree.Element("testsuite", {"name": _text(arm), **_counts(results), **skipped})
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in {**about, **_numbers(results)}.items():
        ElementTree.SubElement(properties, "property", {"name": _text(name), "value": _text(value)})
    for result in results:
        suite.append(_case(arm, result))
    return suite


def _counts(results: Sequence[GateResult]) -> dict[str, str]:
    return {
        "tests": str(len(results)),
        "failures": str(sum(result.outcome == "fail" for result in results)),
        "errors": "0",
    }


def _numbers(results: Sequence[GateResult]) -> dict[str, str]:
    """Figures as fractions of the base's value, at full precision; none where there is none."""
    found: dict[str, str] = {}
    for result in results:
        key = f"{result.gate.name} {result.gate.allowed}"
        found[f"{key}: outcome"] = result.outcome
        if result.change.value is not None:
            found[f"{key}: change"] = repr(result.change.value)
        if result.change.interval is not None:
            low, high = result.change.interval
            found |= {f"{key}: low": repr(low), f"{key}: high": repr(high)}
    return found


def _case(arm: str, result: GateResult) -> ElementTree.Element:
    name = f"{result.gate.name} {result.gate.allowed}"
    case = ElementTree.Element("testcase", {"classname": _text(arm), "name": _text(name)})
    said = f"{change_in_words(result)}: {result.why}"
    if result.outcome == "pass":
        ElementTree.SubElement(case, "system-out").text = _text(said)
        return case
    tag = "failure" if result.outcome == "fail" else "skipped"
    detail = {"message": _text(said), "type": result.outcome}
    ElementTree.SubElement(case, tag, detail).text = _text(METRICS[result.gate.metric][1])
    return case


def _text(text: str) -> str:
    """Text that XML can hold: no control characters, which it has no escape for."""
    return "".join(c for c in clean(text) if c not in "\ufffe\uffff")
