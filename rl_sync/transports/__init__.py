"""How versions get from the trainer to the rollouts."""
