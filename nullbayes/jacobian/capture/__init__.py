"""From a batch to its Jacobian rows: hooks, one batched backward, and the paths beside them."""
