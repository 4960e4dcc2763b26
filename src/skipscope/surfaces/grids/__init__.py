"""Grids of points, the engines that compute them, and the stores that keep them."""
