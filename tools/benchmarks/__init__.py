"""What `residency-tools bench` measures: one module per group of rows, on shared loads, stands and readings."""
