"""Latency profiles: how long a device needs, as tables and as predictions. Imports nothing of ours."""
