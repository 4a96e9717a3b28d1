"""How fast the parts are: timed beside their peers where the hardware is, compiled where it is not."""
