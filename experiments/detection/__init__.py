"""Which score finds inputs that the training data say nothing about: all scores of a single network, side by side.

Every family of problems has members that choices are made on (``tuning``) and members that are judged once
(``judging``), written down in :mod:`experiments.detection.families`. A set that a nearest neighbour in the *inputs*
solves (mean AUROC over .97) needs no network: it is marked in the tables and does not count towards any claim.
"""

from __future__ import annotations

from experiments.detection.running import NAME, jobs, report

__all__ = ["NAME", "jobs", "report"]
