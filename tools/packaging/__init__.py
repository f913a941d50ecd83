"""What `residency-tools package` is made of: the lock file, the bill of materials and the Debian package."""
