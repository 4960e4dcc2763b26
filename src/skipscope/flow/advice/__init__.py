"""Remedies for a network, tried on copies."""
