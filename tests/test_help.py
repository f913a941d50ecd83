"""Every command of both programs says how it is called, by examples that are right, and what its exit status means."""

import argparse
import re
import shlex
import subprocess
import sys

import pytest

from agent import __main__ as agent_line
from tools import __main__ as tools_line

COMMON = {"exit status:", "examples:"}


def commands(parser, words=()):
    """The words of every command that can be called, and its parser."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for group in groups:
        for name, inner in group.choices.items():
            yield from commands(inner, (*words, name))
    yield words, parser


def of_agent():
    return [("residency-agent", words) for words, _ in commands(agent_line._parser())]


def of_tools():
    found = [("residency-tools", ())]
    for command in tools_line.COMMANDS:
        if tools_line.is_here(command):
            found += [
                ("residency-tools", words) for words, _ in commands(tools_line.parser(command)) if command in words
            ]
    return found


MAINS = {"residency-agent": agent_line.main, "residency-tools": tools_line.main}


def told(program, words, capsys):
    with pytest.raises(SystemExit) as caught:
        MAINS[program]([*words, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def examples(text):
    """The calls below `examples:`, with continued lines joined."""
    lines = text.split("\nexamples:\n")[1].replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


@pytest.mark.parametrize(
    ("program", "words"),
    of_agent() + of_tools(),
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_command_shows_examples_that_are_right_and_its_exit_status(program, words, capsys):
    text = told(program, words, capsys)
    for part in COMMON:
        assert f"\n{part}\n" in text
    assert re.search(r"exit status:\n  0   \S.*\n  1   \S.*\n  2   \S", text)
    calls = examples(text)
    assert calls
    for call in calls:
        assert tuple(call[: 1 + len(words)]) == (program, *words)
        parser = agent_line._parser() if program == "residency-agent" else tools_line.parser(call[1])
        if "--help" not in call:
            parser.parse_args(call[1:])


def test_commands_of_the_agent_are_all_here():
    names = {words[0] for _, words in of_agent() if words}
    assert names >= {
        "init",
        "run",
        "check",
        "status",
        "explain",
        "egress-rules",
        "doctor",
        "audit",
        "sign",
        "reference",
    }


@pytest.mark.parametrize(
    ("words", "missing", "extra"),
    [
        (["demo"], "rich", "demo"),
        (["verify", "drive.mcap"], "mcap", "tools"),
        (["listen", "--help"], "foxglove_schemas_protobuf", "tools"),
        (["train", "network", "data", "--folder", "run"], "torch", "train"),
        (["package", "dist"], "hatchling", "package"),
    ],
)
def test_command_says_which_extra_has_the_library_that_is_not_installed(words, missing, extra):
    script = f"import sys; sys.modules[{missing!r}] = None; from tools.__main__ import main; sys.exit(main({words!r}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    told = f"residency-tools {words[0]}: {missing} is not installed: pip install 'residency-agent[{extra}]'\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", told)


def test_missing_module_of_our_own_is_a_mistake_that_shows_where():
    script = "import sys; sys.modules['tools.demo_report'] = None; from tools.__main__ import main; main(['demo'])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
