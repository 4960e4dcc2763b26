"""Find shortcuts by rules over the recorded trace of one forward pass."""
