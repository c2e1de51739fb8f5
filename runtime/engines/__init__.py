"""Engines run experts. One seam, looked up by name in a table."""
