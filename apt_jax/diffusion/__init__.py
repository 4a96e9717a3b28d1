"""Flow matching as pure functions: interpolation, the time shift, samplers. No modules, no state."""
