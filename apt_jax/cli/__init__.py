"""The `apt-jax` command: one file per subcommand, each with `add_arguments(parser)` and `run(args)`."""
