"""The machine in front of you: probes, and the calibration that is made of them."""
