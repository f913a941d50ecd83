from pathlib import Path

import pytest

from agent.errors import InvalidConfigError
from agent.settings import typed
from agent.settings.config import AgentConfig, load_agent, load_policy, shipped_manifest
from agent.settings.policy_config import PolicyConfig

ROOT = Path(__file__).parent.parent
MINIMAL = """
[vehicle]
source = "urn:example:1"
name = "one"
[intake]
telemetry = ["vehicle/#"]
"""


def mistakes(tmp_path, text, load=load_agent):
    file = tmp_path / "agent.toml"
    file.write_text(text)
    with pytest.raises(InvalidConfigError) as caught:
        load(file)
    assert all(mistake.file == str(file) for mistake in caught.value.mistakes)
    return {mistake.key: mistake for mistake in caught.value.mistakes}


def test_minimal_file_takes_the_defaults_and_makes_its_paths_absolute(tmp_path):
    file = tmp_path / "agent.toml"
    file.write_text(MINIMAL)
    config = load_agent(file)
    assert config.broker.port == 1883
    assert config.paths.policy == str(tmp_path / "policy.toml")
    assert config.model.manifest == ""


def test_every_mistake_is_named_with_key_found_and_wanted(tmp_path):
    text = MINIMAL + '[broker]\nport = "x"\nhsot = "y"\n[limits]\npayload_bytes = 0\n[[position]]\nformat = "morse"\n'
    found = mistakes(tmp_path, text)
    assert set(found) == {
        "broker.port",
        "broker.hsot",
        "limits.payload_bytes",
        "position[0].topic",
        "position[0].format",
    }
    assert found["broker.port"].found == "x"
    assert found["broker.port"].wanted == "int"
    assert "host" in found["broker.hsot"].wanted
    assert found["position[0].topic"].found == "nothing"


def test_value_of_an_unknown_key_is_not_told(tmp_path):
    (tmp_path / "agent.toml").write_text(MINIMAL + '[broker]\npassword = "hunter2"\n[brokr]\npassword = "hunter2"\n')
    with pytest.raises(InvalidConfigError, match=r"broker\.password: found 'an unknown key'") as caught:
        load_agent(tmp_path / "agent.toml")
    assert "hunter2" not in str(caught.value)


def test_missing_tables_and_wrong_shapes_are_named(tmp_path):
    assert set(mistakes(tmp_path, "")) == {"vehicle", "intake"}
    assert set(mistakes(tmp_path, MINIMAL + "credentials = 3\n")) == {"intake.credentials"}
    assert "vehicle" in mistakes(tmp_path, 'vehicle = "car"\n[intake]\ntelemetry = []\n')


def test_keys_of_the_users_own_tables_stand_in_the_mistake(tmp_path):
    text = 'version = "1"\nrules = []\n[regions.cn]\ncountries = ["china"]\n'
    text += '[endpoints.a]\nhost = ""\n[classes]\n[permit]\n'
    found = mistakes(tmp_path, text, load_policy)
    assert set(found) == {"regions.cn.countries", "endpoints.a.host"}


def test_file_that_is_missing_or_not_toml_is_a_mistake_of_the_file(tmp_path):
    with pytest.raises(InvalidConfigError, match="No such file"):
        load_agent(tmp_path / "absent.toml")
    assert set(mistakes(tmp_path, "[vehicle\n")) == {"the file"}


def test_shipped_examples_are_valid():
    load_agent(ROOT / "systemd" / "agent.example.toml")
    load_policy(ROOT / "systemd" / "policy.example.toml")


def test_reference_names_every_key_with_its_meaning():
    for wanted in (AgentConfig, PolicyConfig):
        for key in typed.keys(wanted):
            assert key.meaning, key.name
    names = {key.name for key in typed.keys(PolicyConfig)}
    assert {"rules[].class", "endpoints.NAME.networks", "permit", "version"} <= names


def test_shipped_manifest_is_named_where_it_lies():
    assert shipped_manifest().name == "detector.json"
