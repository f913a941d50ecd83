"""residency-agent: keeps vehicle data inside the regions that permit it."""

__version__ = "0.1.0"
