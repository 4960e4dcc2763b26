"""Edits of a model: shortcuts added, and batch-norm statistics recalibrated."""
