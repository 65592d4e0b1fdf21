"""What a step really did: collectives counted, memory held, spans in time."""
