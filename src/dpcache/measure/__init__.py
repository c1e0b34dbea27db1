"""What full runs show: recording them, and the calibration that comes of it."""
