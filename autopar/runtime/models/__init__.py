"""Where the module to train comes from, and what it learns."""
