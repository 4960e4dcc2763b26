"""The papers behind the lecture, reproduced on two cores: ``python -m reproductions``."""
