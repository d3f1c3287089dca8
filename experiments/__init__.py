"""The empirical evaluation: every claim, against every method that people would use instead.

    python -m experiments [names…] [--setting small|processor|full] [--seeds N] [--only-method …]

One file per experiment; ``python -m experiments --list`` names them. What is trained or measured is kept under
``out/experiments`` one piece at a time, so that a run goes on where it was stopped; tables and figures are written to
``experiments/results/<setting>``. ``small`` is all of it in minutes, to see that it runs; what is claimed rests on the
others.
"""
