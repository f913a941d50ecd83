import re
from pathlib import Path

from agent import commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_reference_in_the_readme_is_the_codes():
    start, end = "by tests/test_readme.py -->\n", "<!-- end of reference -->"
    printed = README[README.index(start) + len(start) : README.index(end)]
    assert printed.strip() == commands.reference().strip()


def test_files_and_sections_that_the_readme_names_exist():
    for name in re.findall(r"`((?:agent|tools|tests|systemd|models)/[\w./-]+\.\w+)`", README):
        assert (ROOT / name).exists(), name
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in README.splitlines()}
    for anchor in re.findall(r"\]\(#([\w-]+)\)", README):
        assert anchor in headings, anchor
