"""The page of promises names tests that there are, and the files about the project agree with each other."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

import fastbp

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_the_tests_are_there(file):
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {test for name, test in NAMED if name == file} <= there


def test_each_promise_is_held_by_something():
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("|") and "---" not in line]
    promises = [row for row in rows if row[0].strip() != "promise"]
    assert len(promises) > 30 and all(len(row) == 3 for row in rows)
    assert all("test_" in held or held.strip().startswith("CI: ") for _, held, _ in promises)


def test_the_files_about_the_project_agree():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if not (ROOT / "CITATION.cff").exists():
        pytest.skip("needs a checkout")
    citation, changes = ((ROOT / name).read_text(encoding="utf-8") for name in ("CITATION.cff", "CHANGELOG.md"))
    assert f"version: {fastbp.__version__}\n" in citation and f"license: {about['license']}\n" in citation
    assert f"\n## {fastbp.__version__}" in changes and about["authors"][0]["name"] in citation
    assert about["authors"][0]["name"] in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Report a vulnerability" in (ROOT / "docs" / "SECURITY.md").read_text(encoding="utf-8")
