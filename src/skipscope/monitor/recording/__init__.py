"""What is read while a training runs: rows of steps, gradients by weight, the flow, and what is missing."""
