"""A module divided under a plan: one file for each way of dividing it, and the step of the parts together."""
