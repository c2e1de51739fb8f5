"""Trains a carved model end to end. All modules here need torch; the exporter imports them when that is asked for."""
