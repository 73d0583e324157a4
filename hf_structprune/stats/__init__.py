"""What is measured on calibration text."""
