"""Edits of a model: add shortcuts, and recalibrate batch-norm statistics."""
