"""From readings to a verdict: evidence, rules, causes and words."""
