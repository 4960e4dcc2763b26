"""Recording during a training: gradients of each step, the flow, and causes of missing gradients."""
