"""What a run needs and how fast it can be, found by compiling it for hardware that is not there."""
