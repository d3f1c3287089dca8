"""The user's network as a pure function of weights and inputs; batches, loaders, randomness."""
