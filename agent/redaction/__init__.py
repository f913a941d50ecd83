"""Pictures in, redacted pictures out, in a process of its own."""
