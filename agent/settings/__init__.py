"""Both configuration files: read, typed, validated; every mistake named."""
