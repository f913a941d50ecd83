"""residency-agent: keeps vehicle data inside the regions that permit it.

Importing it silences onnxruntime, whose Linux wheels (1.32 as measured) report to mobile.events.data.microsoft.com as
soon as they are loaded, and keep a device id under ~/.cache. Its own `disable_telemetry_events` does not stop that.
"""

import os

__version__ = "0.1.0"

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
