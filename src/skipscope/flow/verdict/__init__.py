"""Verdict on readings: evidence, rules, causes and wording."""
