"""residency-tools: what testers and trainers use; shares its logic with the agent."""

import agent  # noqa: F401 - before any tool loads onnxruntime, which the agent's package silences
