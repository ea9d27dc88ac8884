"""Rendering of bills from plain models. No orchestrator, no database, no clock: the same inputs give the same bytes."""
