"""No library that the agent or its tools load may talk to anybody by itself."""

import subprocess
import sys

import pytest

LOADED = """
import importlib, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print("loaded with ORT_DISABLE_TELEMETRY =", os.environ.get("ORT_DISABLE_TELEMETRY"))

os.environ.pop("ORT_DISABLE_TELEMETRY", None)
sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("module", ["agent.redaction.detector", "tools.evaluation.baselines"])
def test_onnxruntime_is_told_to_report_nothing_before_it_is_loaded(module):
    told = subprocess.run([sys.executable, "-c", LOADED, module], capture_output=True, text=True, check=True)
    assert told.stdout == "loaded with ORT_DISABLE_TELEMETRY = 1\n"
