"""Simulator and automatic planner of hybrid parallel training."""

__version__ = "0.1.0"
