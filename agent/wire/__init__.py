"""The wire format: attributes, envelope, signature, topics, and their description."""
