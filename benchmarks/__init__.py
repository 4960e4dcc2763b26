"""Benchmarks of skipscope: each figure a ratio measured in one run. See ``python -m benchmarks --help``."""
