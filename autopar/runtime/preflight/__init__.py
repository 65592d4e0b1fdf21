"""Is every node fit for a long run? Ranks gather facts, ``judge`` judges them."""
