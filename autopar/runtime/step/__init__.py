"""One training step of one rank under a plan, and what goes wrong in it."""
