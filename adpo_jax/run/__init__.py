"""A run's life: the parts made from a config, its folder, checkpoints, interruptions."""
