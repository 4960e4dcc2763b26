"""Grids of points, and the stores that keep them."""
