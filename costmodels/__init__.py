"""Physics of training hardware: seconds and bytes of one operation, one collective, one pipeline.

Knows devices, links, primitive operations and collectives; knows no model, no plan and no framework.
"""
