"""Forward and backward passes whose gradients are read, before any judgement."""
