"""Evaluation of the loss at points of a plane: the plain loop, and faster strategies."""
