"""The demonstration: train, fit, measure, and write a report that anyone can look at.

``run_demo()`` does it all; ``nullbayes demo`` and ``make demo`` call it. One file per concern: ``tasks``, ``models``
and ``training`` make data and network, ``evaluation`` measures one method, ``regression`` is the in-between picture,
``running`` puts them in order, ``console`` prints.
"""

from nullbayes.demo.running import run_demo as run_demo
from nullbayes.demo.tasks import Settings as Settings
