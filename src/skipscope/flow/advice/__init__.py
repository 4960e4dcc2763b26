"""Remedies, tried on copies."""
