"""Curvature over a grid."""
