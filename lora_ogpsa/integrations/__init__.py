"""Plugins for training front ends. Each module needs its own front end, and nothing else does."""
