"""The constants of the course, imported as `clawdemy_data`: every figure with its source. This file
makes them findable once installed."""
