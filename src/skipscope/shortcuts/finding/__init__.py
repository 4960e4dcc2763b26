"""Finding shortcuts: rules over the recorded trace of one forward pass."""
