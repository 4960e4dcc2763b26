"""Forward and backward passes that read gradients and activations."""
