"""Several processes that train together: sums over them, sharded weights, and what is done when one of them fails."""
