"""Models: numbers, presets, Hugging Face configurations and captured modules, each turned into an OpGraph."""
