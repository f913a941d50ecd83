import ast
import re
from pathlib import Path

from agent import commands, journal

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


def events(tree):
    """(event, level, data) of every `log.LEVEL("event", extra={...})`; an event may be one of two."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=level), args=arguments, keywords=given):
                names = [leaf.value for leaf in ast.walk(arguments[0]) if isinstance(leaf, ast.Constant)]
                assert names, f"line {node.lineno}: an event is a constant name"
                assert len(arguments) == 1, f"line {node.lineno}: an event's data stands in extra"
                data = [key.value for keyword in given if keyword.arg == "extra" for key in keyword.value.keys]
                yield from ((name, level, " ".join(data)) for name in names)


def test_every_log_event_of_the_code_stands_in_the_readme_and_no_other():
    found = {event for path in sorted((ROOT / "agent").rglob("*.py")) for event in events(ast.parse(path.read_text()))}
    found.add((journal.LIBRARY_EVENT, "any", "library error"))
    table = README[README.index("| event | level | data | meaning |") :].split("\n\n")[0].splitlines()[2:]
    listed = [tuple(cell.strip().strip("`") for cell in row.split("|")[1:4]) for row in table]
    assert sorted(listed) == sorted(found)
