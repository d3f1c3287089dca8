"""How good predictions are, in figures with standard errors: what an evaluation is made of."""
