"""Hazards of a tool that touches other people's models and files, each tried many times: ``make trust`` prints the table.

Every number in the table is counted in the run. ``test_trust.py`` runs a few tries of each in the fast tests, and
plants a fault in each row that must turn it red.
"""

from trust._files import FILES
from trust._hazard import Hazard, Row, run
from trust._model import MODEL
from trust._numbers import NUMBERS
from trust._terminal import TERMINAL

HAZARDS: tuple[Hazard, ...] = (*MODEL, *NUMBERS, *FILES, *TERMINAL)

__all__ = ["HAZARDS", "Hazard", "Row", "run"]
