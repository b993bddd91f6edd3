"""Doubles of machines: devices with the attributes that the real PJRT client gives, from the
sources in `machines`."""
