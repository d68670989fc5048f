"""Fails where a test was skipped for a reason that tests/expected_skips.txt does not list.

python tests/check_skips.py JUNIT.xml     # written by pytest --junitxml
"""

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def unexpected_skips(report: Path, expected: Path) -> list[str]:
    """Returns "test: reason" of each skip in a JUnit report whose reason no line of `expected` matches."""
    lines = expected.read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line.strip() and not line.startswith("#")]
    found = []
    for case in ET.parse(report).iter("testcase"):
        for skip in case.findall("skipped"):
            reason = skip.get("message") or ""
            if not any(re.fullmatch(pattern, reason, re.DOTALL) for pattern in patterns):
                found.append(f"{case.get('classname')}.{case.get('name')}: {reason}")
    return found


def main() -> None:
    """Runs the command."""
    found = unexpected_skips(Path(sys.argv[1]), Path(__file__).parent / "expected_skips.txt")
    if found:
        sys.exit("error: expected no skips but those of tests/expected_skips.txt, found\n  " + "\n  ".join(found))


if __name__ == "__main__":
    main()
