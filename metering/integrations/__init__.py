"""Seams into the frameworks apps are made with. Each is imported by name, and only with its framework installed."""
