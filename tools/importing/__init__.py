"""Readers of other recordings: each gives MQTT messages in the order of their capture."""
