"""What is in a payload: pictures that hide, fields that may leave."""
