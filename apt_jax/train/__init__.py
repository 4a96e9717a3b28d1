"""One training loop for all stages: state, compiled steps, checkpoints, health and logs."""
