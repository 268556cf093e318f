"""How long a step takes: a machine's roofline, several devices, and the back of the envelope."""
