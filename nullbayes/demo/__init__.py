"""The demonstration: train, fit, measure, and write a report that anyone can look at.

``run_demo()`` does it all; ``nullbayes demo`` and ``make demo`` call it. One file per concern: ``models`` and
``training`` make the network, ``evaluation`` measures one method, ``regression`` draws the in-between picture,
``running`` puts them in order, ``console`` prints, ``writing`` writes.
"""

from .running import run_demo

__all__ = ["run_demo"]
