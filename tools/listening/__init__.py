"""The reference consumer behind `residency-tools listen`: judge, keep, store and show what an endpoint receives."""
