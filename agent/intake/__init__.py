"""Taking messages from the in-car broker along the line into the ledger."""
