"""Puts the hand-made results within reach of this room's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
