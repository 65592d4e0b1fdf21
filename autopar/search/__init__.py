"""The space of plans and the exact search through it."""
