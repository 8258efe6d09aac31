"""Which blocks a version is made of, on the trainer's side and on the rollout's."""
