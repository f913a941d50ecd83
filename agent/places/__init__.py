"""Where and when: borders, fixes, and the regions in which something may have been captured."""
