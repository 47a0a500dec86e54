"""Errors, configuration, registries, seeding and logs: what every room stands on (no torch here)."""
